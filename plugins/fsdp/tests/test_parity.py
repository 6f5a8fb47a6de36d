"""Sharded training gives the losses of plain PyTorch, in the same processes, to rounding."""

import pytest

pytestmark = pytest.mark.multiprocess
EXACT = 1e-6
FP32 = [
    "full", "full, blocks", "blocks by size", "blocks by a function", "grad-op", "no shard", "hybrid", "offload",
    "activations", "prefetch", "no prefetch", "ignored", "one rank loads",
]  # fmt: skip
LOOPS = ["accumulate 3", "accumulate 2, clipped"]
HALF = ["bf16", "bf16, accumulate 3", "fp16, accumulate 2, clipped"]


@pytest.fixture(scope="module")
def two(run_worker):
    return run_worker("parity.py")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("way", FP32)
def test_every_way_to_shard_gives_the_losses_of_hand_written_ddp_and_fsdp(two, version, way):
    for rank in two:
        for hand in ("ddp", f"fsdp{version}"):
            assert rank[f"{version} {way}"] == pytest.approx(rank[f"hand {hand}"], abs=EXACT)
    assert two[0][f"{version} {way}"] != two[1][f"{version} {way}"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_accumulated_and_clipped_losses_are_those_of_hand_written_ddp_and_fsdp(two, version, loop):
    for rank in two:
        for hand in ("ddp", f"fsdp{version}"):
            assert rank[f"{version} {loop}"] == pytest.approx(rank[f"hand {hand} {loop}"], abs=EXACT)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("loop", HALF)
def test_half_precision_gives_the_losses_of_hand_written_fsdp_with_the_same_policy(two, version, loop):
    for rank in two:
        assert rank[f"{version} {loop}"] == pytest.approx(rank[f"hand fsdp{version} {loop}"], abs=EXACT)


@pytest.mark.parametrize("loop", HALF)
def test_half_precision_stays_near_ddp_under_autocast(two, loop):
    # Gathered parameters are rounded once more than under DDP; steps of 0.05 carry that on.
    for rank in two:
        for version in (1, 2):
            assert rank[f"{version} {loop}"] == pytest.approx(rank[f"hand ddp {loop}"], abs=0.02)
