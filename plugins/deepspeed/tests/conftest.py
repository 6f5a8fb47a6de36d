"""Start workers of the deepspeed plugin in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"
TIMEOUT = 240


@pytest.fixture(scope="session")
def run_job(tmp_path_factory):
    """Run a worker in some processes; return its output and what each rank wrote, in order of rank."""

    def run(worker, *args, processes=2, options=(), environ=None, fails=False):
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        command = [sys.executable, "-m", "torchport", "launch", "--num-processes", str(processes), *options]
        done = subprocess.run(
            [*command, str(WORKERS / worker), str(folder), *map(str, args)],
            env={**os.environ, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert fails or done.returncode == 0, done.stdout
        return done.stdout, [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]

    return run
