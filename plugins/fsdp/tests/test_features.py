"""What a sharded run can do besides training."""

import pytest

pytestmark = pytest.mark.multiprocess
BOTH = pytest.mark.parametrize("version", [1, 2])


@pytest.fixture(scope="module")
def two(run_worker):
    return run_worker("features.py")


def numbers(value) -> list[float]:
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]


@BOTH
def test_an_optimizer_that_has_stepped_before_prepare_goes_on_with_its_state(two, version):
    for rank in two:
        result = rank[f"{version} optimizers"]
        assert result["error"] == pytest.approx(0.0, abs=1e-6)
        assert result["groups"] == [[6, 0.05], [9, 0.025]]
        assert result["steps"] == [4.0]
        assert result["in the model"]


def test_after_prepare_an_optimizer_holds_no_whole_parameter(two):
    assert [rank["2 optimizers"]["plain elements"] for rank in two] == [0, 0]


def test_models_and_optimizers_may_be_prepared_one_after_the_other_in_either_order(two):
    for rank in two:
        for losses in rank["separate_calls"]:
            assert losses == pytest.approx(rank["alone"], abs=1e-6)


@BOTH
def test_with_ram_efficient_loading_only_rank_0_makes_weights_and_tied_ones_stay_tied(two, version):
    assert [rank[f"{version} one rank loads"]["meta"] for rank in two] == [False, True]
    for rank in two:
        result = rank[f"{version} one rank loads"]
        assert result["losses"] == pytest.approx(result["ddp"], abs=1e-6)


@BOTH
def test_all_processes_start_from_the_states_of_rank_0(two, version):
    for rank in two:
        assert rank[f"{version} seeds"] == pytest.approx(rank["same seeds"], abs=1e-6)


@BOTH
def test_full_parameters_are_whole_inside_and_changes_are_kept_on_request(two, version):
    for rank in two:
        assert rank[f"{version} whole"]["shapes"]
        assert rank[f"{version} whole"]["plain"]
    assert two[0][f"{version} whole"]["values"] == [0.25, 1.0]  # 1.0 is the buffer


@BOTH
def test_the_whole_state_is_on_rank_0_in_host_memory_under_the_names_of_the_users_model(two, version):
    names = two[0][f"{version} states"]["names"]
    assert len(names) == 16
    assert {"scale", "embed.weight", "blocks.1.down.bias"} <= set(names)
    assert two[0][f"{version} states"]["devices"] == ["cpu"]
    assert two[1][f"{version} states"]["names"] == []


def test_a_whole_state_that_only_rank_0_has_can_be_loaded(two):
    assert two[0]["2 states"]["loaded"]


@BOTH
@pytest.mark.parametrize("norm_type", ["2.0", "1.0", "inf"])
def test_clipping_knows_the_norm_of_the_whole_model(two, version, norm_type):
    for rank in two:
        found, hand, after = rank[f"{version} norms"][norm_type]
        assert found == pytest.approx(hand, rel=1e-5)
        assert after == pytest.approx(0.01, rel=1e-3)
        assert rank[f"{version} norms"]["value"] == pytest.approx(1e-9, rel=1e-5)


@BOTH
def test_an_overflow_on_one_process_skips_the_step_on_all(two, version):
    for rank in two:
        assert rank[f"{version} overflow"] == {"skipped": [True, False], "scale": 32768.0}


def test_items_weigh_the_same_over_processes_and_micro_batches(two):
    for rank in two:
        assert rank["tokens_weigh_the_same"] == pytest.approx([0.0] * 15, abs=1e-6)


@BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_uneven_batches_all_count_and_all_processes_take_the_same_steps(two, version, accumulate):
    results = [rank[f"{version} uneven {accumulate}"] for rank in two]
    hand = two[0][f"hand uneven {accumulate}"]
    assert [result["seen"] for result in results] == [3, 3]
    assert [result["ends"] for result in results] == [[False, False, True]] * 2
    assert results[0]["parameters"].keys() == hand.keys()
    for name, value in hand.items():
        assert numbers(results[0]["parameters"][name]) == pytest.approx(numbers(value), abs=1e-6)


def test_a_backward_can_be_told_to_exchange_gradients_after_all(two):
    assert [rank["triggered"] for rank in two] == [True, True]


@pytest.mark.parametrize("how", ["compiled", "wrapped_by_compile"])
def test_compiled_models_train_alike_and_keep_their_names(two, how):
    for rank in two:
        assert rank[how][0] == pytest.approx(rank["alone"], abs=1e-6)
    assert two[0][how][1] == two[0]["2 states"]["names"]


def test_trainable_16_bit_parameters_are_held_in_float32_under_mixed_precision_only(two):
    assert two[0]["low_precision"] == {"bf16": ["torch.float32"], "no": ["torch.bfloat16"]}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shared", "'blocks.0.up.weight' is shared by modules of two units"),
        ("class", "no module of the class Blok\n  found:  Block, Embedding"),
        ("no class", "the model repeats: Linear, Block, LayerNorm"),
        ("activations", "activation_checkpointing needs units"),
        ("pattern", "ignored_params='hed.*' matches no name"),
        ("group", "2 processes cannot be divided into groups of 3"),
        ("meta", "parameters of the model have no values: embed.weight"),
        ("flat", "an optimizer was made before its model is sharded, and use_orig_params=False"),
    ],
)
def test_what_cannot_work_is_refused_on_every_process_with_what_to_do(two, what, words):
    for rank in two:
        assert words in rank["refusals"][what]
        assert "try:" in rank["refusals"][what]
