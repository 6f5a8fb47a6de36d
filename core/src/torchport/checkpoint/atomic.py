"""Write a folder so that it is there whole or not at all.

Files are written to a temporary folder beside the target and flushed to disk; a manifest with their sizes and
checksums comes last; then one rename puts the folder in place. A crash at any instant leaves the previous folder.
"""

from __future__ import annotations

import ctypes
import json
import os
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
_NAMED = 3
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


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
        CheckpointError: if a known file is missing or has another size.
    """
    described = {}
    if missing := [name for name in sorted(known or {}) if not (folder / name).is_file()]:
        more = f" and {len(missing) - _NAMED} others" if len(missing) > _NAMED else ""
        raise CheckpointError(
            f"files that were written are not in {folder}",
            found=f"no {', '.join(missing[:_NAMED])}{more}",
            hint="a folder that all machines share",
        )
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
        CheckpointError: if a file is missing or has another size than its writer says, if one has the manifest's
            name, or if there is something else than a checkpoint at `target`.
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
            raise _damaged(folder, f"{name} is missing")
        if file.stat().st_size != listed[name]["size"]:
            raise _damaged(
                folder, f"{name} has {file.stat().st_size} bytes instead of {listed[name]['size']}"
            )
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(checksum, (folder / name for name in mine))
        differing = [name for name, value in zip(mine, found, strict=True) if value != listed[name]["crc32"]]
    if differing:
        raise _damaged(folder, f"the contents of {', '.join(differing)} differ from what was written")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    Raises:
        CheckpointError: if there is none, or it cannot be read or followed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint",
            found="no such folder" if not folder.is_dir() else f"no {MANIFEST} in it",
            hint=others(folder),
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        names = list(dict(manifest["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the manifest of {folder} cannot be read", reason=str(error), hint=others(folder)
        ) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} was written in checkpoint format {manifest.get('format')}",
            found=f"this version reads format {FORMAT}",
        )
    for name in names:
        if reason := leads_outside(folder, name):
            raise CheckpointError(
                f"the manifest of {folder} refers to {name!r}, outside its folder",
                reason=reason,
                hint=others(folder),
            )
    return manifest


def leads_outside(folder: Path, name: str, also: Path | None = None) -> str:
    """Return why a name that a list of files gives is not that of a file in its folder; empty if it is.

    Args:
        folder: The folder.
        name: The name of a file, relative to the folder.
        also: A further folder to which symbolic links may lead.
    """
    if Path(name).is_absolute():
        return "it is an absolute path"
    if ".." in Path(name).parts:
        return "it leads up"
    real = Path(os.path.realpath(folder / name))
    homes = [Path(os.path.realpath(home)) for home in (folder, also) if home is not None]
    if not any(home in real.parents for home in homes):
        return f"it is a link to {real}"
    return ""


def saved_at(folder: Path) -> float:
    """Return when a checkpoint was saved, in seconds since 1970: what its manifest says, or else the file's time."""
    path = folder / MANIFEST
    try:
        return float(json.loads(path.read_text())["saved_at"])
    except (ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def others(folder: Path) -> str:
    """Name the complete checkpoint beside one that cannot be loaded that was saved last; empty if there is none."""
    beside = [path.parent for path in folder.parent.glob(f"*/{MANIFEST}") if path.parent != folder]
    beside = [path for path in beside if not path.name.startswith(".")]
    return f"load_state({str(max(beside, key=saved_at))!r}), the newest of the others" if beside else ""


def _damaged(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged", found=found, reason="nothing has been loaded", hint=others(folder)
    )


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
    older = folder.with_name(folder.name.replace(".writing-", ".older-"))
    target.rename(older)
    folder.rename(target)
    older.rename(folder)
