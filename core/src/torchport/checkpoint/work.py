"""The hidden folder in which a checkpoint is written, and what killed saves left of theirs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from torchport.checkpoint.target import MANIFEST
from torchport.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_LEFTOVER = re.compile(r"\.(?P<target>.+)\.(?P<kind>writing|older|deleted)-(?P<token>[0-9a-f]{8})")
_LOCK = re.compile(r"\.(?P<target>.+)\.(?P<token>[0-9a-f]{8})\.lock")
_ABANDONED = 86400.0
"""Seconds after which the work of another process counts as abandoned, where the file system has no locks."""


class WorkFolder:
    """The temporary folder of a save, beside its target, with a lock that ends when its process does.

    Attributes:
        path: The folder.

    Args:
        target: Where the checkpoint will be.
        token: Eight hexadecimal digits, the same on every process.
        leader: Whether this process makes the folder and takes it away.
    """

    def __init__(self, target: Path, token: str, leader: bool) -> None:
        self.path = target.parent / f".{target.name}.writing-{token}"
        self._target, self._leader = target, leader
        self._lock = target.parent / f".{target.name}.{token}.lock"
        self._descriptor: int | None = None

    def open(self) -> None:
        """Make the folder, after taking away what killed saves have left beside it.

        Raises:
            CheckpointError: if the parent folder cannot be made or written to.
        """
        if not self._leader:
            return
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            clean(self._target.parent)
            self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
            _lock(self._descriptor)
            self.path.mkdir()
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"the checkpoint {self._target} cannot be written",
                reason=f"{type(error).__name__}: {error.strerror or error} ({error.filename})",
                hint="a folder that exists and can be written to",
            ) from error

    def check(self, divided: bool) -> None:
        """Find the folder, on a process of any machine, when its leader has made it.

        Args:
            divided: Whether each process saves a part of the states, so that loading takes the parts of all.

        Raises:
            CheckpointError: if it is not there.
        """
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not there",
                hint="a folder that all machines share"
                + ("" if divided else ", or ProjectConfiguration(save_on_each_node=True)"),
            )

    def close(self) -> None:
        """Take away what is left of the folder, and the lock."""
        if not self._leader:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            self._lock.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def remove(folder: Path) -> None:
    """Delete a checkpoint: its name goes at once, its files after that.

    Of one that is a symbolic link, the link goes. What somebody else deletes meanwhile is gone too.

    Raises:
        OSError: if it cannot be deleted.
    """
    with suppress(FileNotFoundError):
        if folder.is_symlink():
            folder.unlink()
            return
        doomed = folder.with_name(f".{folder.name}.deleted-{secrets.token_hex(4)}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clean(parent: Path) -> None:
    """Take away what killed saves have left in a folder, and put a checkpoint back that was being replaced.

    What a living process is writing is left alone: it holds a lock.
    """
    found = [(path, match) for path in parent.glob(".*") if (match := _LEFTOVER.fullmatch(path.name))]
    for path, match in found:
        lock = parent / f".{match['target']}.{match['token']}.lock"
        if match["kind"] != "deleted" and _in_use(lock, path):
            continue
        target = parent / match["target"]
        if match["kind"] == "older" and (path / MANIFEST).is_file() and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        lock.unlink(missing_ok=True)
    for path in parent.glob(".*.lock"):  # of saves that ended before they had a folder, or after
        if _LOCK.fullmatch(path.name) and not _in_use(path, path):
            path.unlink(missing_ok=True)


def _in_use(lock: Path, work: Path) -> bool:
    """Whether the process that took a lock may still be working; where nobody can tell, for a day."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return _is_young(work)
    try:
        held = _lock(descriptor)
        return _is_young(work) if held is None else not held
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take a lock that ends with this process; `False` if another has it, `None` if there are no locks here."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _ABANDONED
    except OSError:
        return False
