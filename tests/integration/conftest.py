"""Starting `torchport launch` as a user does, and proving that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchport import envvars

TAG = "LAUNCH_TEST_TAG"
_JOB = frozenset(variable.name for variable in envvars.VARIABLES)


class Finished:
    """How a launch ended: its exit code, what it printed, and how long it took in seconds."""

    def __init__(self, returncode: int, stdout: str, stderr: str, seconds: float) -> None:
        self.returncode, self.stdout, self.stderr, self.seconds = returncode, stdout, stderr, seconds

    @property
    def lines(self) -> list[str]:
        return sorted(self.stdout.splitlines())


def _hear_hangups() -> None:
    """Undo what `nohup` does, should the tests run under it: a launcher rightly ignores what it was told to."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Launches:
    """Starts launches in one folder, each with its processes tagged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []

    def write(self, name: str, source: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    def environ(self, **variables: str) -> dict[str, str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if k not in _JOB and not k.startswith(("TORCHPORT_", "ACCELERATE_"))
        }
        return {**kept, TAG: self.tag, **variables}

    def start(
        self, *arguments: str, command: tuple[str, ...] = (), stdin: str | None = None, **variables: str
    ):
        command = command or (sys.executable, "-m", "torchport", "launch")
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=self.folder,
            env=self.environ(**variables),
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_hangups,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 90, **options) -> Finished:
        began = time.monotonic()
        process = self.start(*arguments, stdin=stdin, **options)
        stdout, stderr = process.communicate(stdin, timeout=timeout)
        return Finished(process.returncode, stdout, stderr, time.monotonic() - began)

    def wait_for(self, *names: str, timeout: float = 60) -> None:
        """Wait until workers have written these files."""
        deadline = time.monotonic() + timeout
        while missing := [name for name in names if not (self.folder / name).exists()]:
            assert time.monotonic() < deadline, f"no worker wrote {missing}"
            time.sleep(0.01)

    def alive(self) -> dict[int, str]:
        """Return the command lines of all processes of these launches that run now, zombies left out."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{TAG}={self.tag}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has just ended, or is not ours
                continue
        return found

    def wait_until_gone(self, within: float) -> float:
        """Wait until no process of these launches runs; return the seconds it took."""
        began = time.monotonic()
        while left := self.alive():
            assert time.monotonic() - began < within, f"still running after {within} s: {left}"
            time.sleep(0.01)
        return time.monotonic() - began

    def close(self) -> dict[int, str]:
        left = self.alive()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.started:
            process.communicate()
        return left


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    """Launches whose processes must all be gone when the test ends."""
    made = Launches(tmp_path)
    yield made
    left = made.close()
    assert not left, f"processes outlived their launch: {left}"
