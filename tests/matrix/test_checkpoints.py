"""Under every strategy: save, be killed, go on in another job; and whole weights from any strategy to any other."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cell
from checkpoints import CELLS, WHOLE
from run import launch

pytestmark = [pytest.mark.multiprocess, pytest.mark.plugins]
WORKER = Path(__file__).with_name("checkpoints.py")
LAYOUTS = ("ddp", "fsdp1", "fsdp2 grad-op", "fsdp2 hybrid", "deepspeed 0", "deepspeed 3")
AMID = [cell for cell in CELLS if cell.layout in LAYOUTS and cell.precision == "no"]
"""Those whose checkpoints are saved once more by jobs that are killed; the others at length."""

SUM = 1e-6
"""Strategies add the same gradients up in another order, and clip by norms that differ by 1e-6."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def job(prefork, folder):
    def run(what: str, *names: str) -> subprocess.CompletedProcess:
        return launch(2, str(WORKER), what, str(folder), *names, torchport=(str(prefork / "torchport"),))

    return run


def results(what: str, folder: Path) -> list[dict]:
    return [json.loads((folder / f"{what}{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def saved(job, folder):
    done = job("save")
    assert done.returncode == 0, done.stdout
    assert "FutureWarning" not in done.stdout
    return results("save", folder)


def be_killed(job, cells: list[Cell]) -> None:
    """Save once more over each checkpoint, in jobs of which a process is killed amid a file."""
    for cell in cells:
        rank = int(cell.layout not in ("ddp", "fsdp1", "deepspeed 0"))  # one that writes weights
        done = job("die", cell.name, str(rank))
        assert f"rank {rank} failed first, killed by SIGXFSZ" in done.stdout, done.stdout
        assert done.returncode == 128 + signal.SIGXFSZ


@pytest.fixture(scope="module")
def loaded(job, folder, saved):
    be_killed(job, AMID)
    done = job("load")
    assert done.returncode == 0, done.stdout
    return results("load", folder)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_killed_job_goes_on_from_its_checkpoint_as_if_it_had_not_been_interrupted(saved, loaded, cell):
    for before, after in zip(saved, loaded, strict=True):
        assert after["goes on"][cell.name] == before[cell.name]["after"]


@pytest.mark.long
def test_a_job_that_is_killed_amid_a_file_under_the_others_goes_on_from_the_older_checkpoint(
    job, folder, saved
):
    cells = [cell for cell in CELLS if cell not in AMID]
    be_killed(job, cells)
    done = job("go-on", *(cell.name for cell in cells))
    assert done.returncode == 0, done.stdout
    for before, after in zip(saved, results("go-on", folder), strict=True):
        assert after["goes on"] == {cell.name: before[cell.name]["after"] for cell in cells}


@pytest.mark.parametrize("cell", WHOLE, ids=lambda cell: cell.layout)
def test_whole_weights_are_those_of_the_run_in_a_plain_model(saved, loaded, cell):
    for before, after in zip(saved, loaded, strict=True):
        assert after["whole"][cell.name] == before[cell.name]["before"]


@pytest.mark.parametrize("target", WHOLE, ids=lambda cell: cell.layout)
@pytest.mark.parametrize("source", WHOLE, ids=lambda cell: cell.layout)
def test_whole_weights_of_any_strategy_train_on_alike_under_any_other(loaded, source, target):
    for rank in loaded:
        found = rank["begins"][f"{source.layout} -> {target.layout}"]
        assert found == pytest.approx(rank["begins"]["ddp -> ddp"], abs=SUM)


@pytest.mark.parametrize(
    "change", ["ddp -> deepspeed 2", "fsdp2 full -> deepspeed 3", "deepspeed 2 -> fsdp2 full"]
)
def test_states_that_a_strategy_cannot_take_over_are_refused_with_the_way_by_whole_weights(loaded, change):
    for rank in loaded:
        assert "save whole weights" in rank["refused"][change]
        assert "save_model()" in rank["refused"][change]
