"""Run worker scripts in real processes and hand their results to the tests."""

import json
from pathlib import Path

import pytest
from jobs import run_job

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory, prefork):
    """Launch `worker FOLDER ARGS...` and return what each rank wrote to `FOLDER/rankN.json`, in order of rank."""

    def run(
        worker: str, *args: str, processes: int = 2, options: tuple[str, ...] = (), code: int = 0, **variables
    ):
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        command = [prefork / "torchport", "launch", "--num-processes", processes, *options]
        job = run_job(command, WORKERS / worker, folder, *args, environ=variables, code=code)
        return job.ranks if code == 0 else job.output

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the checkpoints are that the tests share."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def killed(run_worker, folder):
    """By two processes: a checkpoint; then one was killed while they saved the next."""
    output = run_worker("checkpoints.py", "die", str(folder), code=137)
    assert "rank 1 failed first, killed by SIGKILL" in output
    return json.loads((folder / ".killed.json").read_text())


@pytest.fixture(scope="session")
def four(run_worker, folder, killed):
    """By four processes: a checkpoint with each strategy, loaded again with some, and hybrid training."""
    return run_worker("checkpoints.py", "both", str(folder), "hybrid", "2 sharded", processes=4)
