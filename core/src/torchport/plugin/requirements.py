"""Requirements such as `name>=1.0,<2`, judged without importing `packaging` where they are that plain.

Starting a script must not wait for a parser of everything PEP 508 allows. What is not plain, or not met, is
judged by `packaging`.
"""

from __future__ import annotations

import operator
import re

_NUMBERS = r"\d+(?:\.\d+)*"
_BOUND = rf"\s*(>=|<=|<|>)\s*({_NUMBERS})\s*"
_PLAIN = re.compile(rf"\s*([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)\s*((?:{_BOUND})(?:,{_BOUND})*)?\s*")
_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}


def is_plain(requirement: str) -> bool:
    """Whether a requirement is a name with lower and upper bounds of plain numbers, and therefore valid."""
    return _PLAIN.fullmatch(requirement) is not None


def name_of(requirement: str) -> str:
    """Return the normalized name that a requirement begins with (PEP 503); empty if there is none."""
    found = re.match(r"\s*([A-Za-z0-9][\w.-]*)", requirement)
    return re.sub(r"[-_.]+", "-", found[1]).lower().rstrip("-") if found else ""


def plainly_met(requirement: str, version: str) -> bool:
    """Whether a plain requirement is met by a version of plain numbers; `False` means: ask `packaging`."""
    plain = _PLAIN.fullmatch(requirement)
    if plain is None or not re.fullmatch(_NUMBERS, version):
        return False
    bounds = re.findall(_BOUND, plain[2] or "")
    return all(_COMPARE[sign](*_aligned(version, bound)) for sign, bound in bounds)


def _aligned(first: str, second: str) -> tuple[list[int], list[int]]:
    """Return two versions as lists of one length: 1.0 is the same version as 1."""
    numbers = [[int(part) for part in version.split(".")] for version in (first, second)]
    length = max(map(len, numbers))
    one, two = ([*parts, *[0] * (length - len(parts))] for parts in numbers)
    return one, two
