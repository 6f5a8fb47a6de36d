"""Where a checkpoint may be put: in a folder of its own."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from torchport.errors import CheckpointError

MANIFEST = "manifest.json"
_NAMED = 3


def resolve(target: Path) -> Path:
    """Return the folder that a path means, through symbolic links.

    Raises:
        CheckpointError: if it is the working directory, or contains it.
    """
    real, here = Path(os.path.realpath(target)), Path(os.path.realpath(os.curdir))
    if real == here or real in here.parents:
        raise CheckpointError(
            f"a checkpoint cannot be put in place of {real}",
            found="it is the working directory" if real == here else f"the working directory {here} is in it",
            reason="an older checkpoint of that name is replaced as a whole",
            hint="a folder of its own: save_state('checkpoint')",
        )
    return real


def refuse_foreign(target: Path) -> None:
    """Refuse to replace anything but an older checkpoint or an empty folder.

    Raises:
        CheckpointError: if there is a file, or a folder with files that no checkpoint's manifest lists.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(
            f"a checkpoint cannot be put in place of {target}",
            found="a file of that name",
            hint="a folder of its own",
        )
    known = _listed(target)
    foreign = list(itertools.islice((name for name in _files(target) if name not in known), _NAMED + 1))
    if foreign:
        more = " and others" if len(foreign) > _NAMED else ""
        raise CheckpointError(
            f"a checkpoint cannot be put in place of {target}",
            found=f"files that are not of a checkpoint: {', '.join(foreign[:_NAMED])}{more}",
            reason="an older checkpoint of that name is replaced as a whole",
            hint=f"a folder of its own: save_state({str(target / 'checkpoint')!r})",
        )


def _listed(folder: Path) -> set[str]:
    """Return what a checkpoint's manifest lists, and the manifest; nothing where there is none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {MANIFEST, *manifest["files"]} if "format" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _files(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            yield (Path(place) / name).relative_to(folder).as_posix()
