"""Run worker scripts in real processes and hand their results to the tests."""

from pathlib import Path

import pytest
from jobs import run_job

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory):
    """Run `command + [worker, folder, *args]` and return what each rank wrote, in order of rank."""

    def run(command: list[str], worker: str, *args: str, environ: dict[str, str] | None = None) -> list[dict]:
        folder = tmp_path_factory.mktemp(worker.removesuffix(".py"))
        return run_job(command, WORKERS / worker, folder, *args, environ=environ).ranks

    return run


@pytest.fixture(scope="session")
def launch(prefork):
    """The command line that starts a script in this many processes."""

    def command(processes: int, *options: str) -> list[str]:
        return [str(prefork / "torchport"), "launch", "--num-processes", str(processes), *options]

    return command


@pytest.fixture(scope="session")
def python(prefork):
    """The command line that starts a script in one process."""
    return [str(prefork / "python")]
