"""What the tests of the core and of all plugins share: `tests/support`, and the order that keeps two cores busy."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest_plugins = ["preforking"]
LONG = ("multiprocess", "packaging")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the files that have no test to run by itself, when only these are asked for."""
    if config.option.markexpr != "alone" or not collection_path.match("test_*.py"):
        return None
    return "mark.alone" not in collection_path.read_text() or None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files whose tests start processes first: the short ones fill the gaps at the end."""
    files = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.path)]
    files.sort(key=lambda tests: not any(test.get_closest_marker(mark) for test in tests for mark in LONG))
    items[:] = itertools.chain(*files)
