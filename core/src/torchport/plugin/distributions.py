"""What installed distributions say about themselves: their version, what they require, the plugins they announce.

`importlib.metadata` takes longer to import than Python takes to start, so it is asked only where the folders on
`sys.path` do not tell all: for archives, older formats, and finders that bring distributions of their own.
"""

from __future__ import annotations

import functools
import os
import stat
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, NamedTuple

from torchport.plugin.requirements import normalized

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_METADATA = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}
"""Suffixes of folders of metadata, and the file in them that has name, version and requirements."""

_Searched = tuple[tuple[str, int], ...]


class Announcement(NamedTuple):
    """An entry point, and what the metadata of its distribution says.

    Attributes:
        name: Name of the entry point.
        reference: What it names: `"module"` or `"module:attribute"`.
        distribution: Name of the distribution.
        version: Its version.
        requires: Its requirements, as PEP 508 writes them.
    """

    name: str
    reference: str
    distribution: str
    version: str
    requires: tuple[str, ...] = ()

    @classmethod
    def of(cls, point: EntryPoint) -> Announcement:
        """Read what `importlib.metadata` found."""
        reference = point.value.partition("[")[0].strip()
        if point.dist is None:
            return cls(point.name, reference, point.module, "")
        metadata = point.dist.metadata
        requires = metadata.get_all("Requires-Dist") or point.dist.requires or ()
        return cls(point.name, reference, metadata["Name"], metadata["Version"], tuple(requires))


def announcements(group: str) -> tuple[Announcement, ...]:
    """Return the entry points that installed distributions announce in a group."""
    searched = _searched()
    found = _announced(searched, group) if searched is not None else None
    if found is None:
        from importlib.metadata import entry_points

        found = tuple(map(Announcement.of, entry_points(group=group)))
    return found


def version_of(distribution: str) -> str | None:
    """Return the version of a distribution; `None` if it is not installed."""
    searched = _searched()
    if searched is None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(distribution)
        except PackageNotFoundError:
            return None
    folder = _folders(searched).get(normalized(distribution))
    versions = (value for key, value in _headers(folder) if key == "version") if folder else iter(())
    return next(versions, None)


def _searched() -> _Searched | None:
    """Return the folders of `sys.path` and when each was last changed; `None` if they are not all there is."""
    if [finder for finder in sys.meta_path if hasattr(finder, "find_distributions")] != [PathFinder]:
        return None
    searched = []
    for path in sys.path:
        try:
            found = os.stat(path or os.curdir)
        except OSError:
            continue
        if not stat.S_ISDIR(found.st_mode) or path.endswith(".egg"):
            return None
        searched.append((os.path.abspath(path), found.st_mtime_ns))
    return tuple(searched)


@functools.lru_cache(maxsize=1)
def _folders(searched: _Searched) -> dict[str, str]:
    """Return the metadata of each distribution by its name; where there are several, the first is what counts."""
    found: dict[str, str] = {}
    for folder, _ in searched:
        try:
            entries = os.listdir(folder)
        except OSError:  # nothing is imported from it either
            continue
        for entry in entries:
            stem, suffix = os.path.splitext(entry)
            if suffix in _METADATA:
                found.setdefault(normalized(stem.partition("-")[0]), os.path.join(folder, entry))
    return found


@functools.lru_cache(maxsize=1)
def _announced(searched: _Searched, group: str) -> tuple[Announcement, ...] | None:
    """Return the entry points of a group; `None` if one is in an older format."""
    found = []
    for folder in _folders(searched).values():
        try:
            with open(os.path.join(folder, "entry_points.txt"), encoding="utf-8") as file:
                text = file.read()
        except OSError:  # most distributions have none
            continue
        points = list(_section(text, group)) if f"[{group}]" in text else []
        if points and folder.endswith(".egg-info"):
            return None
        if points:
            headers = list(_headers(folder))
            said = dict(headers)
            requires = tuple(value for key, value in headers if key == "requires-dist")
            for name, reference in points:
                found.append(
                    Announcement(name, reference, said.get("name", ""), said.get("version", ""), requires)
                )
    return tuple(found)


def _section(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Yield the names and references of one section of an `entry_points.txt`."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[]")
        elif section == group and "=" in line and not line.startswith("#"):
            name, _, reference = line.partition("=")
            yield name.strip(), reference.partition("[")[0].strip()


def _headers(folder: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a distribution's metadata, names in lower case; nothing if it cannot be read."""
    path = os.path.join(folder, _METADATA[os.path.splitext(folder)[1]])
    try:
        with open(path if os.path.isdir(folder) else folder, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line == "\n":  # what follows is the description
                    return
                key, colon, value = line.partition(":")
                if colon and not line[0].isspace():  # else the line before goes on
                    yield key.lower(), value.strip()
    except OSError:
        return
