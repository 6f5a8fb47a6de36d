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
BIN = Path(sys.executable).parent
TIMEOUT = 240.0


def _stacks(process: subprocess.Popen) -> str:
    """End a job that hangs: each Python process of it prints its stacks when it is aborted."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGABRT)
    output, _ = process.communicate(timeout=30)
    return output


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory):
    """Run `command + [worker, folder, *args]` and return what each rank wrote, in order of rank."""

    def run(command: list[str], worker: str, *args: str, environ: dict[str, str] | None = None) -> list[dict]:
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        process = subprocess.Popen(
            [*command, str(WORKERS / worker), str(folder), *args],
            env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            output = f"hung for {TIMEOUT} seconds; where each process was:\n{_stacks(process)}"
        assert process.returncode == 0, output
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]

    return run


@pytest.fixture(scope="session")
def launch():
    """The command line that starts a script in this many processes."""

    def command(processes: int, *options: str) -> list[str]:
        return [str(BIN / "torchport"), "launch", "--num-processes", str(processes), *options]

    return command
