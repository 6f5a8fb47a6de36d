"""Checkpoints of two processes, loaded by one."""

import pytest

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def two(run_job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_job("saving.py", folder)[1]


@pytest.fixture(scope="module")
def found(run_job, two):
    return run_job("reshard.py", two[0], processes=1)[1][0]


@pytest.mark.parametrize(("saved", "stage"), [(0, 0), (1, 1), (1, 2), (3, 3)])
def test_one_process_goes_on_with_what_two_have_saved(two, found, saved, stage):
    ranks = [rank[f"stage {saved}"] for rank in two[1]]
    resumed = found[f"{saved} to {stage}"]
    assert resumed["loaded"] == ranks[0]["weights"]
    means = [(first + second) / 2 for first, second in zip(*(rank["on"] for rank in ranks), strict=True)]
    assert resumed["on"] == pytest.approx(means, abs=1e-6)


def test_deepspeeds_own_tool_consolidates_a_checkpoint(two, found):
    assert found["consolidated"] == two[1][0]["stage 3"]["weights"]


@pytest.mark.parametrize("stage", [0, 3])
def test_whole_weights_can_be_loaded_into_an_engine(found, stage):
    assert found[f"whole into {stage}"] == found["consolidated"]


def test_whole_weights_are_rounded_to_the_precision_of_the_engine(found):
    assert found["whole into 2"] == pytest.approx(found["consolidated"], rel=2**-8)


@pytest.mark.parametrize("stages", ["0 into 1", "2 into 3"])
def test_stages_that_cannot_be_converted_are_refused(found, stages):
    assert "DeepSpeed converts states between stages 1 and 2" in found[stages]


def test_a_checkpoint_with_code_in_it_is_refused_unread(found):
    message, executed = found["code"]
    assert "it names builtins.getattr, pathlib.Path" in message
    assert executed is False
