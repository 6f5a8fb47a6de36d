"""The support table is made from scorecards alone, and refuses those that prove nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from torchport.plan.discovery import discover
from torchport.testing import Scorecard
from torchport.testing.scorecard import FAIL, NOT_CLAIMED, PASS, Result

DOCS = Path(__file__).parents[2] / "docs"

_spec = importlib.util.spec_from_file_location("docs_scorecards", DOCS / "scorecards.py")
scorecards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scorecards)


def card(**changes) -> Scorecard:
    values = {
        "kind": "backend",
        "name": "acme",
        "verified_on": "stub",
        "date": "2026-01-02",
        "versions": {"torch": "2.13.0", "torch-acme": ""},
        "platform": "Linux",
        "results": (Result("a", "L0", "one", PASS), Result("b", "L1", "two", NOT_CLAIMED, "no streams")),
    }
    return Scorecard(**{**values, **changes})


def test_a_scorecard_becomes_a_row_in_the_words_that_are_allowed(tmp_path):
    card().write(tmp_path / "backend-acme.json")
    row = scorecards.support(tmp_path).splitlines()[2]
    assert row == (
        "| [`acme`](scorecards/backend-acme.json) | backend | verified against a stub of the vendor's documented API"
        " | L0 (1) | L1, L2, L3, L4 | `b` | Linux | 2026-01-02 | torch 2.13.0 |"
    )


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"verified_on": ""}, "backend-acme", "does not say how it was verified"),
        ({"results": (Result("a", "L0", "one", FAIL, "no"),)}, "backend-acme", "has failed checks: ['a']"),
        ({}, "backend-other", "is the scorecard of the backend acme"),
    ],
)
def test_a_scorecard_that_proves_nothing_is_refused(tmp_path, changes, name, message):
    card(**changes).write(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match=re.escape(message)):
        scorecards.support(tmp_path)


def test_the_page_lists_every_committed_scorecard_and_nothing_else():
    text = (DOCS / "support.md").read_text()
    listed = set(re.findall(r"\(scorecards/([a-z0-9_-]+)\.json\)", text))
    assert listed == {path.stem for path in (DOCS / "scorecards").glob("*.json")}
    assert {"collectives-gloo", "collectives-mpi", "precision-bf16", "tracker-jsonl"} <= listed


def test_every_installed_plugin_of_this_repository_has_a_scorecard():
    offered = {
        f"{kind}-{name}"
        for kind, entries in discover({}).entries.items()
        for name, entry in entries.items()
        if kind != "command" and entry.plugin.distribution.startswith("torchport-")
    }
    assert {"strategy-single", "launcher-local"} <= offered
    assert offered - {path.stem for path in (DOCS / "scorecards").glob("*.json")} == set()
