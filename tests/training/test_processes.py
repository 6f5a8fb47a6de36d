"""Every behaviour that needs two processes, over gloo: `workers/processes.py` and `workers/names.py`."""

from pathlib import Path

import pytest
from jobs import checks_of

pytestmark = pytest.mark.multiprocess
WORKERS = [Path(__file__).parent / "workers" / name for name in ("processes.py", "names.py")]


@pytest.fixture(scope="module")
def outcomes(run_worker, launch):
    """What each process says of each check, by worker."""
    return {worker: run_worker(launch(2), worker.name) for worker in WORKERS}


@pytest.mark.parametrize(
    ("worker", "check"),
    [pytest.param(worker, check, id=check) for worker in WORKERS for check in checks_of(worker)],
)
def test_two_processes(outcomes, worker, check):
    assert [rank.get(check, "not reached") for rank in outcomes[worker]] == ["passed", "passed"]
