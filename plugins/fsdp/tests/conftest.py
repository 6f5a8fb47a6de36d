"""Run worker scripts in real processes and hand their results to the tests."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WORKERS = Path(__file__).parent / "workers"
TORCHPORT = Path(sys.executable).parent / "torchport"
TIMEOUT = 200.0


def _stacks(process: subprocess.Popen) -> str:
    """End a job that hangs: each Python process of it prints its stacks when it is aborted."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGABRT)
    output, _ = process.communicate(timeout=30)
    return output


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory):
    """Launch `worker FOLDER ARGS...` and return what each rank wrote to `FOLDER/rankN.json`, in order of rank."""

    def run(
        worker: str, *args: str, processes: int = 2, options: tuple[str, ...] = (), code: int = 0, **variables
    ):
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        command = [str(TORCHPORT), "launch", "--num-processes", str(processes), *options]
        process = subprocess.Popen(
            [*command, str(WORKERS / worker), str(folder), *args],
            env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            output = f"hung for {TIMEOUT} seconds; where each process was:\n{_stacks(process)}"
        assert process.returncode == code, output
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        return results if code == 0 else output

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
