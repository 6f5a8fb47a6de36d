"""Programs that start without importing PyTorch anew: a folder of `python`, `torchport` and `torchrun`.

Most of the processor time of short jobs goes into imports of PyTorch: about four seconds for each process. Tests
whose subject is what a job does, and not how its processes are started, take these programs. `python SCRIPT` runs in a
process forked from one that has imported PyTorch (`prefork_server.py`); `torchport` is the real command line, whose
workers are started by that `python`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import prefork_client
import pytest

HERE = Path(__file__).parent
FOLDER = "PREFORK_FOLDER"
"""Names the folder of this test session to the processes that share its tests."""

MODULES = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.nn.parallel", "torch.utils.data", "numpy", "pluggy", "psutil", "packaging.requirements", "safetensors.torch",
    "sklearn.datasets", "tqdm", "yaml",
)  # fmt: skip
"""What the processes have imported: nothing of Torchport's."""

VARIABLES = {
    "OMP_NUM_THREADS": "1",  # a process with more threads cannot be forked
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # takes longer than the few kernels that jobs compile
}

_TORCHPORT = """#!{python}
import sys
from torchport.cli import main
sys.executable = {client!r}
sys.exit(main())
"""
_TORCHRUN = """#!/bin/sh
PYTHON_EXEC={client} exec {client} -m torch.distributed.run "$@"
"""
_HELD = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Name the folder, and hold open what ends the servers when this process ends."""
    if FOLDER in os.environ:  # this process runs some of the tests of another
        return
    folder = Path(tempfile.mkdtemp(prefix="prefork-"))
    config.stash[_HELD] = hold(folder)
    os.environ[FOLDER] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the servers end."""
    if (held := config.stash.get(_HELD, None)) is not None:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
        os.close(held)


@pytest.fixture(scope="session")
def prefork() -> Path:
    """The folder of the programs, after starting what serves them if that does not run yet."""
    folder = Path(os.environ[FOLDER])
    programs = folder / "bin"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not programs.exists():
            start(folder, sys.executable)
    return programs


def hold(folder: Path) -> int:
    """Return an open file: the servers of a folder end when it is closed."""
    os.mkfifo(folder / "alive")
    return os.open(folder / "alive", os.O_RDWR)


def start(folder: Path, python: str) -> Path:
    """Start the servers of an interpreter, and return the folder of their programs."""
    _start_servers(folder, python)
    return _write_programs(folder, python)


def _start_servers(folder: Path, python: str) -> None:
    """Start a server for the even ranks and one for the odd ones: their strings hash differently, as in any job."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    starting = [
        subprocess.Popen(
            [python, HERE / "prefork_server.py", folder / name, *MODULES],
            env={**environ, **VARIABLES},
            cwd="/",
            start_new_session=True,
        )
        for name in prefork_client.SERVERS
    ]
    assert [server.wait(timeout=120) for server in starting] == [0, 0]


def _write_programs(folder: Path, python: str) -> Path:
    programs = folder / "bin"
    fixed = prefork_client.fixed_at_start(os.environ)
    client = str(programs / "python")
    texts = {
        prefork_client.SETTINGS: json.dumps({"folder": str(folder), "python": python, "fixed": fixed}),
        "python": f"#!{python} -ISE\n{(HERE / 'prefork_client.py').read_text()}",
        "torchport": _TORCHPORT.format(python=python, client=client),
        "torchrun": _TORCHRUN.format(client=client),
    }
    made = folder / "making"
    made.mkdir()
    for name, text in texts.items():
        (made / name).write_text(text)
        (made / name).chmod(0o755)
    return made.rename(programs)
