"""The strategy deepspeed in two processes, beside hand-written DeepSpeed, hand-written DDP and plain PyTorch."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from common import BATCH, STEPS, make_data, make_model

STAGES = (0, 1, 2, 3)
SINGLE = 1e-6  # a few roundings of float32 in losses around 1

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def job(run_job):
    return run_job("engines.py")


@pytest.fixture(scope="module")
def ranks(job):
    return job[1]


def total(model):
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_deepspeed_written_by_hand(ranks, stage):
    for rank in ranks:
        assert rank[f"stage {stage}"]["losses"] == rank[f"stage {stage}"]["hand"]
        assert len(rank[f"stage {stage}"]["losses"]) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_ddp_written_by_hand(ranks, stage):
    for rank in ranks:
        assert rank[f"stage {stage}"]["losses"] == pytest.approx(rank["ddp"], abs=SINGLE)


@pytest.mark.parametrize("stage", STAGES)
def test_without_accumulate_the_engine_counts_micro_batches_itself(ranks, stage):
    for rank in ranks:
        assert rank[f"stage {stage}"]["steps"] == STEPS
        assert rank[f"stage {stage}"]["counted"] == rank[f"stage {stage}"]["losses"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_checkpoint_goes_on_as_if_it_had_not_been_interrupted(ranks, stage):
    for rank in ranks:
        assert rank[f"stage {stage}"]["loaded"] == rank[f"stage {stage}"]["weights"]
        assert rank[f"stage {stage}"]["loaded momenta"] == rank[f"stage {stage}"]["momenta"] > 0
        assert rank[f"stage {stage}"]["resumed"] == rank[f"stage {stage}"]["on"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_window_that_ends_early_is_averaged_over_its_own_micro_batches(ranks, stage):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, labels = make_data(40).tensors
    for start in range(0, 40, 2 * STEPS * BATCH):
        stop = start + 2 * STEPS * BATCH
        optimizer.zero_grad()
        cross_entropy(model(inputs[start:stop]), labels[start:stop]).backward()
        optimizer.step()
    assert [rank[f"stage {stage}"]["stream"] for rank in ranks] == pytest.approx(
        [total(model)] * 2, rel=SINGLE
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_item_of_a_window_weighs_the_same(ranks, stage):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, labels = (torch.split(tensor, BATCH) for tensor in make_data().tensors)
    for first in range(0, len(inputs), 2 * STEPS):
        window = range(first, first + 2 * STEPS)
        counts = {i: 1 + (i // 2 + i % 2) % BATCH for i in window}
        loss = sum(
            cross_entropy(model(inputs[i][: counts[i]]), labels[i][: counts[i]], reduction="sum")
            for i in window
        )
        optimizer.zero_grad()
        (loss / sum(counts.values())).backward()
        optimizer.step()
    assert [rank[f"stage {stage}"]["items"] for rank in ranks] == pytest.approx(
        [total(model)] * 2, rel=SINGLE
    )


@pytest.mark.parametrize("what", ["optimizer", "param"])
def test_offload_to_the_host_changes_no_loss(ranks, what):
    for rank in ranks:
        assert rank[f"offload {what}"] == pytest.approx(rank["ddp"], abs=SINGLE)


def test_bfloat16_is_as_near_as_its_8_bits_allow(ranks):
    for rank in ranks:
        assert rank["bf16"] == pytest.approx(rank["ddp"], rel=2**-8)
        assert rank["bf16"] != rank["ddp"]


def test_deepspeed_says_one_line_for_each_kind_of_engine(job):
    said = [line for line in job[0].splitlines() if "real_accelerator" not in line]  # the worker's own import
    assert [line.removeprefix("[rank0]: torchport: DeepSpeed 0.19.8: ") for line in said] == [
        *(f"ZeRO stage {stage}, precision no, 2 micro-batches of 4 for each step" for stage in STAGES),
        "ZeRO stage 2, precision bf16, 2 micro-batches of 4 for each step",
    ]


# --- what two processes have saved, in one -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(run_job, ranks):
    return run_job("reshard.py", ranks[0]["folder"], processes=1)[1][0]


@pytest.mark.parametrize(("saved", "stage"), [(0, 0), (1, 1), (1, 2), (3, 3)])
def test_one_process_goes_on_with_what_two_have_saved(ranks, found, saved, stage):
    two = [rank[f"stage {saved}"] for rank in ranks]
    resumed = found[f"{saved} to {stage}"]
    assert resumed["loaded"] == two[0]["weights"]
    assert resumed["momenta"] == pytest.approx(two[0]["momenta"], rel=1e-12)
    means = [(first + second) / 2 for first, second in zip(*(rank["on"] for rank in two), strict=True)]
    assert resumed["on"] == pytest.approx(means, abs=1e-6)


def test_deepspeeds_own_tool_consolidates_a_checkpoint(ranks, found):
    assert found["consolidated"] == ranks[0]["stage 3"]["weights"]


@pytest.mark.parametrize("stage", [0, 3])
def test_whole_weights_can_be_loaded_into_an_engine(found, stage):
    assert found[f"whole into {stage}"] == found["consolidated"]


def test_whole_weights_are_rounded_to_the_precision_of_the_engine(found):
    assert found["whole into 2"] == pytest.approx(found["consolidated"], rel=2**-8)


@pytest.mark.parametrize("stages", ["0 into 1", "0 into 3", "1 into 0", "2 into 3", "3 into 0"])
def test_stages_that_cannot_be_converted_are_refused(found, stages):
    assert "DeepSpeed converts states between stages 1 and 2" in found[stages]
    assert "load_checkpoint_in_model(), of what save_model() wrote" in found[stages]


def test_a_checkpoint_with_code_in_it_is_refused_unread(found):
    message, executed = found["code"]
    assert "it names builtins.getattr, pathlib.Path" in message
    assert executed is False
