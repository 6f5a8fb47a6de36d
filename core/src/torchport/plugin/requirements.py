"""Requirements such as `name>=1.0,<2`, judged without importing `packaging` where they are that plain.

Starting a script must not wait for a parser of everything PEP 508 allows. What is not plain is judged by
`packaging`.
"""

from __future__ import annotations

import operator
import re

_NAMED = re.compile(r"\s*([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)\s*(.*)", re.DOTALL)
_BOUND = re.compile(r"\s*(>=|<=|<|>)\s*(\d+(?:\.\d+)*)\s*")
_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:\+[a-z0-9.]*[a-z0-9])?")  # bounds do not look at +cpu
_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}


def normalized(name: str) -> str:
    """Return a distribution's name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """Return the normalized name that a requirement begins with; empty if there is none."""
    found = _NAMED.fullmatch(requirement)
    return normalized(found[1]) if found is not None else ""


def plain_name(requirement: str) -> str:
    """Return the name in a requirement that is a name with bounds of plain numbers; empty if it is another."""
    plain = _read(requirement)
    return plain[0] if plain is not None else ""


def plainly_met(requirement: str, version: str) -> bool | None:
    """Whether a plain requirement is met by a version of plain numbers; `None` means: ask `packaging`."""
    plain = _read(requirement)
    numbers = _VERSION.fullmatch(version)
    if plain is None or numbers is None:
        return None
    return all(_COMPARE[sign](*_aligned(numbers[1], bound)) for sign, bound in plain[1])


def _read(requirement: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Split a plain requirement into its name, and signs and versions; `None` if it is not plain."""
    named = _NAMED.fullmatch(requirement)
    if named is None:
        return None
    bounds = []
    for part in named[2].split(",") if named[2] else ():
        bound = _BOUND.fullmatch(part)
        if bound is None:
            return None
        bounds.append((bound[1], bound[2]))
    return named[1], bounds


def _aligned(first: str, second: str) -> tuple[list[int], list[int]]:
    """Return two versions as lists of one length: 1.0 is the same version as 1."""
    numbers = [[int(part) for part in version.split(".")] for version in (first, second)]
    length = max(map(len, numbers))
    one, two = ([*parts, *[0] * (length - len(parts))] for parts in numbers)
    return one, two
