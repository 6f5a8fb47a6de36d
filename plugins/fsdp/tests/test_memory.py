"""What a sharded run holds in memory, beside hand-written FSDP2 whose optimizer is made afterwards."""

import pytest

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def two(run_worker):
    # So that the system gets memory back at once: glibc else keeps it for later.
    return run_worker("memory.py", MALLOC_MMAP_THRESHOLD_="1000000")


@pytest.mark.parametrize("when", ["prepared", "trained"])
def test_an_optimizer_made_before_prepare_costs_what_one_made_afterwards_costs(two, when):
    parts = {"prepared": 0.5, "trained": 1.5}[when]  # parameters; with AdamW's two moments
    for rank in two:
        assert rank["torchport"][when] == pytest.approx(rank["hand"][when], rel=0.02)
        assert rank["torchport"][when] == pytest.approx(parts * rank["whole"], rel=0.02)


def test_with_ram_efficient_loading_the_others_never_hold_the_model(two):
    main, other = two
    assert main["one loads"] > 0.9
    assert other["one loads"] < 0.6  # its half, and one unit at a time
    assert other["all load"] > 0.9
