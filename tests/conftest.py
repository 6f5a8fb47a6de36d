"""What every test must leave behind: no variables of a job, no child processes, no threads."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from torchport import envvars

_JOB = frozenset(variable.name for variable in envvars.VARIABLES)


def _job_variables() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key in _JOB or key.startswith("TORCHPORT_")}


def _children() -> set[int]:
    """Process ids of the living children of this process (Linux; empty elsewhere)."""
    found = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            found |= {int(pid) for pid in listing.read_text().split()}
        except OSError:  # the thread has ended
            continue
    return found


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
    if not command.strip() or "multiprocessing.resource_tracker" in command:
        return ""  # a zombie, or Python's own helper, which lives as long as this process
    return f"{pid}: {command}"


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves variables of a job, child processes or threads behind."""
    variables, children, threads = _job_variables(), _children(), _threads()
    yield
    left = _job_variables()
    changed = sorted(key for key in variables.keys() | left.keys() if variables.get(key) != left.get(key))
    for key in changed:  # so that the next test is not blamed too
        os.environ.pop(key, None)
        os.environ.update({key: variables[key]} if key in variables else {})
    assert not changed, f"the test changed these variables of its process: {changed}"
    running = [text for pid in sorted(_children() - children) if (text := _describe(pid))]
    assert not running, f"the test left processes running: {running}"
    started = [thread.name for thread in _threads() - threads if thread.is_alive()]
    assert not started, f"the test left threads running: {started}"


class Site:
    """A folder of installed distributions: real metadata and modules, as pip would leave them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(
        self,
        name: str,
        source: str,
        *,
        version: str = "1.0",
        plugin: str | None = None,
        requires: tuple[str, ...] = ("torchport-core>=0.1,<0.2",),
    ) -> None:
        """Install the distribution `name` with one module, announced under its suffix or as `plugin`.

        Args:
            name: Such as `torchport-acme`.
            source: Text of the module `torchport_acme`.
            version: Version of the distribution.
            plugin: Entry-point name.
            requires: Requirements in the metadata.
        """
        module = name.replace("-", "_")
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        point = plugin or name.removeprefix("torchport-")
        (info / "entry_points.txt").write_text(f"[torchport]\n{point} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of distributions that this process, and `PYTHONPATH` for others, can see."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    made = Site(folder)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)
