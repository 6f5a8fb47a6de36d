"""The pytest plugin of the conformance kit: scorecards of the suites that ran. Imports no torch by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from torchport.testing.scorecard import NOT_CLAIMED, merge

if TYPE_CHECKING:
    from torchport.testing.scorecard import Scorecard

RESULT = "torchport conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--scorecards`."""
    group = parser.getgroup("torchport")
    group.addoption(
        "--scorecards",
        metavar="DIR",
        help="Write the scorecard of each conformance suite into this folder, as KIND-NAME.json.",
    )


def _not_claimed(report: Any) -> str | None:
    """Return the reason why a check is not claimed; `None` for any other report."""
    for name, value in getattr(report, "user_properties", ()):
        if name == RESULT and value[0] == NOT_CLAIMED:
            return str(value[1])
    return None


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Count checks that are not claimed by themselves: they have neither passed nor failed."""
    reason = _not_claimed(report) if report.when == "call" and report.passed else None
    return None if reason is None else (NOT_CLAIMED, "n", f"NOT CLAIMED ({reason})")


def _cards() -> list[Scorecard]:
    suites = sys.modules.get("torchport.testing.suites")
    return merge(suites.RAN) if suites is not None else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what is not claimed, and the levels of each suite."""
    reports = terminalreporter.stats.get(NOT_CLAIMED, [])
    if reports:
        terminalreporter.write_sep("=", "not claimed")
        for report in reports:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {_not_claimed(report)}")
    for card in _cards():
        terminalreporter.write_sep("=", f"conformance of {card.kind} {card.name}")
        terminalreporter.write_line(card.in_words())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the scorecards, where a folder was named."""
    folder = session.config.getoption("scorecards", None)
    for card in _cards() if folder else ():
        card.write(Path(folder) / f"{card.kind}-{card.name}.json")
