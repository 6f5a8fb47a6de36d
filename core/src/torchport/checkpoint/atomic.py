"""Write a folder so that it is there whole or not at all.

Files are written to a temporary folder beside the target and flushed to disk; a manifest with their sizes and
checksums comes last; then one rename puts the folder in place. A crash at any instant leaves the previous folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchport.checkpoint.target import MANIFEST, refuse_foreign
from torchport.errors import CheckpointError

FORMAT = 1
_READERS = 4
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def make_folder(folder: Path, target: Path) -> None:
    """Make the temporary folder in which `target` is written.

    Raises:
        CheckpointError: if the parent folder cannot be made or written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {target} cannot be written",
            reason=f"{type(error).__name__}: {error.strerror or error} ({error.filename})",
            hint="a folder that exists and can be written to",
        ) from error


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def describe(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Return size and checksum of each file of a folder, by its path inside; all of them are on the disk then.

    Args:
        folder: The folder.
        known: What is known of files that have been flushed already.

    Raises:
        CheckpointError: if a known file has another size.
    """
    described = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        facts = (known or {}).get(name)
        if facts is None:
            flush(path)
            facts = {"size": size, "crc32": checksum(path)}
        elif facts["size"] != size:
            raise CheckpointError(
                f"{path} has changed while the checkpoint was written",
                found=f"{size} bytes instead of the {facts['size']} that were written",
            )
        described[name] = facts
    return described


def flush(path: Path) -> None:
    """Make the system write a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(
    folder: Path, target: Path, facts: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> None:
    """Complete a folder with a manifest, and put it in place of `target`.

    Args:
        folder: The temporary folder, with all files written.
        target: Where it goes; an older checkpoint there is replaced.
        facts: What else the manifest should say.
        known: Size and checksum of files that their writers have flushed already, by path inside. Other files of
            the folder are flushed and described here.

    Raises:
        CheckpointError: if a file has another size than its writer says, or the manifest's name, or if there is
            something else than a checkpoint at `target`.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        raise CheckpointError(
            f"a save hook has written a file {MANIFEST}",
            reason="that is the name of the checkpoint's own list of files",
            hint="another name",
        )
    files = describe(folder, known or {})
    manifest.write_text(json.dumps({"format": FORMAT, **facts, "files": files}, indent=1) + "\n")
    flush(manifest)
    for place, _, _ in os.walk(folder, topdown=False):
        flush(Path(place))
    refuse_foreign(target)
    if target.exists():
        _exchange(folder, target)
        flush(target.parent)
        shutil.rmtree(folder)
    else:
        folder.rename(target)
        flush(target.parent)


def verify(folder: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Check a folder against its manifest, and return the manifest.

    Args:
        folder: The folder.
        share: Which part of the files to check, where several processes share the work.
        shares: How many parts there are.

    Raises:
        CheckpointError: if the manifest or a file is missing, or a file differs from what was written.
    """
    manifest = read_manifest(folder)
    listed: dict[str, dict[str, Any]] = manifest["files"]
    mine = _part(listed, share, shares)
    for name in mine:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is damaged", found=f"{name} is missing")
        if file.stat().st_size != listed[name]["size"]:
            raise CheckpointError(
                f"{folder} is damaged",
                found=f"{name} has {file.stat().st_size} bytes instead of {listed[name]['size']}",
            )
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(checksum, (folder / name for name in mine))
        differing = [name for name, value in zip(mine, found, strict=True) if value != listed[name]["crc32"]]
    if differing:
        raise CheckpointError(
            f"{folder} is damaged",
            found=f"the contents of {', '.join(differing)} differ from what was written",
        )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    Raises:
        CheckpointError: if there is none, or it cannot be read or followed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        beside = (
            sorted(p.name for p in folder.parent.glob("*") if (p / MANIFEST).is_file())
            if folder.parent.is_dir()
            else []
        )
        raise CheckpointError(
            f"{folder} is not a complete checkpoint",
            found="no such folder" if not folder.is_dir() else f"no {MANIFEST} in it",
            hint=f"complete checkpoints beside it: {', '.join(beside)}" if beside else "",
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        names = list(dict(manifest["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest of {folder} cannot be read", reason=str(error)) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} was written in checkpoint format {manifest.get('format')}",
            found=f"this version reads format {FORMAT}",
        )
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"the manifest of {folder} refers to {name!r}, outside its folder")
    return manifest


def _part(listed: dict[str, dict[str, Any]], share: int, shares: int) -> list[str]:
    """Return the names of one of several parts with about as many bytes each."""
    if shares == 1:
        return list(listed)
    parts: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(listed, key=lambda name: (-listed[name]["size"], name)):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += listed[name]["size"] + 1
    return parts[share]


def _exchange(folder: Path, target: Path) -> None:
    """Exchange two folders in one step, where the system can; else in two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        rename = getattr(libc, "renameat2", None)
        if (
            rename is not None
            and rename(_HERE, os.fsencode(folder), _HERE, os.fsencode(target), _EXCHANGE) == 0
        ):
            return
    older = target.with_name(f".{target.name}.older-{secrets.token_hex(4)}")
    target.rename(older)
    folder.rename(target)
    older.rename(folder)
