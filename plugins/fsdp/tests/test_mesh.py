"""Training over meshes of four processes is that of one process which has every batch as a whole."""

import pytest

pytestmark = pytest.mark.multiprocess
EXACT = 1e-6
MESHES = [
    "replicate 2 x shard 2", "tp 4", "shard 2 x tp 2", "shard 2 x cp 2", "cp 4, ring", "shard 2 x sp 2",
]  # fmt: skip
VARIANTS = [
    "grouped heads, gathered", "grouped heads, ring", "one key head, sp", "not causal, gathered",
    "odd pieces, ring",
]  # fmt: skip


@pytest.fixture(scope="module")
def four(run_worker):
    return run_worker("mesh.py", processes=4)


@pytest.mark.parametrize("mesh", MESHES)
def test_accumulated_losses_and_norms_over_a_mesh_are_those_of_one_process(four, mesh):
    for rank in four:
        plain, found = rank["meshes"]["plain"], rank["meshes"][mesh]
        assert found["losses"] == pytest.approx(plain["losses"], abs=EXACT)
        assert found["norms"] == pytest.approx(plain["norms"], abs=EXACT)
        assert len(found["norms"]) == 2


@pytest.mark.parametrize("case", VARIANTS)
def test_attention_of_every_kind_sees_whole_sequences(four, case):
    for rank in four:
        plain, found = rank["variants"][case]
        assert found == pytest.approx(plain, abs=EXACT)


@pytest.mark.parametrize("mesh", ["shard 2 x cp 2", "shard 2 x sp 2"])
def test_activations_computed_anew_after_the_block_see_whole_sequences_too(four, mesh):
    for rank in four:
        plain, found = rank["variants"][f"backward outside, {mesh}"]
        assert found == pytest.approx(plain, abs=EXACT)


@pytest.mark.parametrize("mesh", ["shard 2 x tp 2", "shard 2 x cp 2"])
def test_half_precision_over_a_mesh_stays_near_one_process_under_autocast(four, mesh):
    for rank in four:
        plain, found = rank["variants"][f"bf16, {mesh}"]
        assert found == pytest.approx(plain, abs=0.02)


def test_tokens_weigh_alike_however_many_each_process_has(four):
    for rank in four:
        assert rank["by token"]["shard 2 x cp 2"] == pytest.approx(rank["by token"]["plain"], abs=EXACT)


def test_losses_are_those_of_hand_written_tensor_and_data_parallelism(four):
    for rank in four:
        assert rank["by hand"]["own"] == pytest.approx(rank["by hand"]["hand"], abs=EXACT)
    assert four[0]["by hand"]["own"] == four[1]["by hand"]["own"]  # tensor parallel: the same batch
    assert four[0]["by hand"]["own"] != four[2]["by hand"]["own"]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("shard 2 x tp 2", "shard 2 x tp 2"),
        ("shard 2 x tp 2", "shard 2 x sp 2"),
        ("shard 2 x tp 2", "ddp"),
        ("shard 2 x cp 2, full", "shard 2 x tp 2"),
    ],
)
def test_a_checkpoint_goes_on_over_the_same_mesh_another_or_none(four, source, target):
    saved = four[0]["checkpoints"]
    assert saved[f"{source} -> {target}"] == pytest.approx(saved[source], abs=EXACT)
    assert len(saved[source]) == 2


# --- what a script sees --------------------------------------------------------------------------------------


def test_processes_of_one_batch_read_alike_and_their_results_count_once(four):
    meshes = [rank["features"]["mesh"] for rank in four]
    assert meshes[0]["read"] == meshes[1]["read"]
    assert meshes[2]["read"] == meshes[3]["read"]
    assert meshes[0]["read"] != meshes[2]["read"]
    for mesh in meshes:
        for kind in ("gathered", "objects"):
            assert sorted(item for batch in mesh[kind] for item in batch) == list(range(10))


def test_processes_of_tensor_parallelism_draw_the_same_random_numbers(four):
    drawn = [rank["features"]["mesh"]["drawn"] for rank in four]
    assert (drawn[0] == drawn[1], drawn[2] == drawn[3]) == (True, True)


def test_whole_parameters_and_states_are_had_from_spread_ones(four):
    for rank in four:
        assert rank["features"]["mesh"]["whole"]
        assert rank["features"]["mesh"]["local"] == [4, 16]  # of 16 by 16, over 2 x 2
    assert four[0]["features"]["mesh"]["written"] == 0.5 * 32 * 16


def test_the_mesh_has_a_dimension_of_each_name_and_each_process_its_place(four):
    assert [rank["features"]["mesh"]["ranks"] for rank in four] == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]
    for rank in four:
        assert rank["features"]["mesh"]["names"] == ["dp_shard", "tp"]
        assert rank["features"]["buffers"]["names"] == ["dp_shard", "cp"]


def test_data_parallelism_by_replicas_has_a_mesh_too(four):
    for index, rank in enumerate(four):
        assert rank["features"]["ddp"] == {"names": ["dp_replicate"], "size": 4, "rank": index, "readers": 1}


def test_buffers_are_parts_inside_and_whole_again_afterwards_unless_said_otherwise(four):
    buffers = [rank["features"]["buffers"] for rank in four]
    assert buffers[0]["positions"] == [0, 1, 2, 3, 12, 13, 14, 15]  # a piece of each end: equally much to do
    assert buffers[1]["positions"] == [4, 5, 6, 7, 8, 9, 10, 11]
    for found in buffers:
        assert found["restored"]
        assert found["kept"] == [2, 8]
        assert found["patched"] == "scaled_dot_product_attention"


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no plan", "no plan was given, and the model has none of its own"),
        ("no such module", "names 'layers.*.query', and the model has no such module"),
        ("no such style", "one of colwise, colwise_rep,"),
        ("tied", "spreads 'embed', whose parameter 'embed.weight' is tied"),
        ("cut heads", "the output features of 'head' cannot be spread over tp_size=4"),
        ("length", "a sequence of 10 cannot be divided over cp_size=4"),
        ("heads", "2 heads of attention cannot be divided over sp_size=4"),
        ("eager", "no call of torch.nn.functional.scaled_dot_product_attention"),
        ("ranks", "parallelism: 'dp_shard 2 x tp 2 (settings"),
        ("mask", "attention with a mask, where sequences are spread by context parallelism"),
        ("nested", "maybe_context_parallel inside of maybe_context_parallel"),
    ],
)
def test_what_cannot_be_is_refused_on_every_process(four, case, sentence):
    for rank in four:
        assert sentence in rank["refusals"][case]


def test_attention_is_pytorchs_own_again_after_a_refusal(four):
    assert {rank["refusals"]["patched"] for rank in four} == {"scaled_dot_product_attention"}
