"""Jobs of real processes under a time limit that turns a hang into a failure. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from torchport import envvars
from torchport.builtin.ranks import without_ranks
from torchport.plugin.specs import KINDS

_LOOK = 0.05
"""Seconds between two looks at a job."""

_GRACE = 10.0
"""Seconds in which processes that were told to end may print where they are."""

TAIL = 6000
"""Characters of a job's output that are kept: those at its end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended.

    Attributes:
        returncode: Exit status of the command.
        output: What its processes printed; of a job that hung, with the stacks of every process.
        hung: Whether it went past its limit.
    """

    returncode: int
    output: str
    hung: bool = False

    def in_words(self, limit: float) -> str:
        """Say how it ended, with the end of what it printed."""
        tail = self.output[-TAIL:].strip()
        if self.hung:
            return f"nothing happened for {limit:g} seconds; where each process was:\n{tail}"
        return f"a process of the job ended early (exit status {self.returncode}):\n{tail}"


def launch_command(processes: int, *options: str, launcher: str = "") -> list[str]:
    """Return the command line that starts what follows it in this many processes, through `torchport launch`."""
    chosen = ["--launcher", launcher] if launcher else []
    return [sys.executable, "-m", "torchport", "launch", "--num-processes", str(processes), *chosen, *options]


def job_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job: this process's, without a place in a job and without choices of plugins."""
    chosen = {kind.variable for kind in KINDS.values() if kind.variable} | {
        envvars.CONFIG_FILE,
        envvars.RESUME,
    }
    kept = {key: value for key, value in without_ranks(os.environ).items() if key not in chosen}
    return {**kept, "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore", **changes}


def run_job(
    command: Sequence[str],
    *,
    limit: float,
    environ: Mapping[str, str] | None = None,
    progress: Callable[[], object] | None = None,
    cwd: str | Path | None = None,
) -> Ended:
    """Run a command to its end.

    Args:
        command: What to run; its Python processes must have `faulthandler` enabled (`PYTHONFAULTHANDLER=1`).
        limit: Seconds after which it counts as hung, and is ended.
        environ: Its environment; by default this process's, with `faulthandler` enabled.
        progress: Called again and again; each time it returns something new, the limit counts anew.
        cwd: Its working directory.
    """
    with TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            list(command),
            env=dict(environ) if environ is not None else {**os.environ, "PYTHONFAULTHANDLER": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,
        )
        hung = False
        try:
            hung = not _ends(process, limit, progress)
            if hung:
                _abort(process)
        finally:
            _end_all(process)
        output.seek(0)
        return Ended(process.returncode, output.read(), hung)


def _ends(process: subprocess.Popen[bytes], limit: float, progress: Callable[[], object] | None) -> bool:
    """Wait; return whether the process has ended by itself before nothing happened for `limit` seconds."""
    seen, deadline = None, time.monotonic() + limit
    while process.poll() is None:
        now = progress() if progress is not None else None
        if now != seen:
            seen, deadline = now, time.monotonic() + limit
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)
    return True


def _abort(process: subprocess.Popen[bytes]) -> None:
    """Make every process of a job print its stacks and end: `faulthandler` does so on SIGABRT."""
    workers = descendants(process.pid)
    for pid in workers or [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a job."""
    left = [*descendants(process.pid), process.pid] if process.poll() is None else []
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have, in order of their numbers."""
    parents = _parents()
    found: set[int] = set()
    added = {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in added} - found
        found |= added
    return sorted(found)


def _parents() -> dict[int, int]:
    """Return the parent of every process of this machine that can be seen."""
    if Path("/proc/self/stat").exists():
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = stat.read_text(errors="replace").rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1])
        return parents
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, timeout=30, check=False
    ).stdout
    return {int(line.split()[0]): int(line.split()[1]) for line in listing.splitlines()}
