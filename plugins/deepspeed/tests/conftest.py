"""Start workers of the deepspeed plugin in real processes."""

from pathlib import Path

import jobs
import pytest

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(scope="session")
def run_job(tmp_path_factory, prefork):
    """Run a worker in some processes; return its output and what each rank wrote, in order of rank."""

    def run(worker, *args, processes=2, options=(), environ=None):
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        command = [prefork / "torchport", "launch", "--num-processes", processes, *options]
        variables = {"OMP_NUM_THREADS": "1", **(environ or {})}
        job = jobs.run_job(command, WORKERS / worker, folder, *args, environ=variables)
        return job.output, job.ranks

    return run
