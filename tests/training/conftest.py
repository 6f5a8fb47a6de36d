"""Run worker scripts in real processes and hand their results to the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory):
    """Run `command + [worker, folder, *args]` and return what each rank wrote, in order of rank."""

    def run(command: list[str], worker: str, *args: str, environ: dict[str, str] | None = None) -> list[dict]:
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        finished = subprocess.run(
            [*command, str(WORKERS / worker), str(folder), *args],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **(environ or {})},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]

    return run


@pytest.fixture(scope="session")
def launch():
    """The command line that starts a script in this many processes."""

    def command(processes: int, *options: str) -> list[str]:
        return [str(BIN / "torchport"), "launch", "--num-processes", str(processes), *options]

    return command
