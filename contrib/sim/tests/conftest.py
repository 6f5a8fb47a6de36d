"""Scripts on simulated devices, in processes of their own: a process that has them keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Job, run_job

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(scope="session")
def run(tmp_path_factory, prefork):
    """Run `worker FOLDER ARGS...` on four devices, launched where `processes` is more than one."""

    def job(worker: str, *args: object, processes: int = 1, code: int = 0, **variables: str) -> Job:
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        launch = [prefork / "torchport", "launch", "--num-processes", processes]
        command = launch if processes > 1 else [prefork / "python"]
        environ = {"SIM_DEVICE_COUNT": "4", **variables}
        return run_job(command, WORKERS / worker, folder, *args, environ=environ, code=code)

    return job
