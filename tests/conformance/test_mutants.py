"""The kit rejects each wrong plugin by the check that is meant for it, and passes the right ones they derive from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from torchport.testing.checks import Subject, catalogue
from torchport.testing.runner import Task, run_tasks, scorecard
from torchport.testing.scorecard import FAIL, NOT_CLAIMED, PASS

MUTANTS = Path(__file__).parent / "mutants"
sys.path.insert(0, str(MUTANTS))
import torchport_mutants as mutants  # noqa: E402 - descriptors only

sys.path.remove(str(MUTANTS))

DISTRIBUTIONS = {
    "torchport-mutants": ("torchport_mutants", "torchport-core>=0.1,<0.2"),
    "torchport-mutant-heavy": ("mutant_heavy", "torchport-core>=0.1,<0.2"),
    "torchport-mutant-homeless": ("mutant_homeless", "numpy"),
}


class Reader:
    """Reads what the trackers of the mutants write."""

    def read(self, folder: Path) -> list[dict]:
        return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def cases() -> list[tuple[str, str, str]]:
    """List kind, class and check of every mutant."""
    tables = {
        "backend": mutants.BACKENDS,
        "collectives": mutants.COLLECTIVES,
        "precision": mutants.PRECISIONS,
        "strategy": mutants.STRATEGIES,
        "tracker": mutants.TRACKERS,
    }
    found = [(kind, name, check) for kind, table in tables.items() for name, check in table.items()]
    return [*found, *((kind, name, check) for (kind, name), check in mutants.PACKAGES.items())]


def subject(kind: str, name: str) -> Subject:
    settings = {"backend": "cpu"} if kind in ("collectives", "strategy", "precision") else {}
    if kind in ("strategy", "precision"):
        settings |= {"strategies": ("single",), "precisions": ("no",)}
    return Subject(kind=kind, name=mutants.plugin_name(name), **settings)


def task(kind: str, name: str, wanted: set[str]) -> Task:
    about = subject(kind, name)
    named = {check.format(about.name) for check in wanted}
    chosen = [check for check in catalogue(about) if check.id in named]
    assert {check.id for check in chosen} == named, f"{about.name}: there is no check {named}"
    return Task(about, chosen, suite=Reader())


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Results of every check that was run, by kind, class and check: all of them share a few jobs."""
    site = tmp_path_factory.mktemp("site")
    for name, (module, requires) in DISTRIBUTIONS.items():
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "Summary: wrong on purpose"]
        lines += ["Requires-Python: >=3.10", f"Requires-Dist: {requires}", "", "# Wrong on purpose", ""]
        (info / "METADATA").write_text("\n".join(lines))
        (info / "entry_points.txt").write_text(f"[torchport]\n{name.removeprefix('torchport-')} = {module}\n")
    with pytest.MonkeyPatch.context() as patch:
        for folder in (MUTANTS, site):
            patch.syspath_prepend(folder)
        patch.setenv(
            "PYTHONPATH", os.pathsep.join((str(site), str(MUTANTS), os.environ.get("PYTHONPATH", "")))
        )
        tasks = {(kind, name): task(kind, name, {check}) for kind, name, check in cases()}
        for kind in ("backend", "collectives", "precision", "strategy", "tracker"):
            meant = {check for other, _, check in cases() if other == kind}
            tasks[kind, f"Steady{kind.capitalize()}"] = task(kind, f"Steady{kind.capitalize()}", meant)
        cpu = Subject(kind="backend", name="cpu", environ={"TORCHINDUCTOR_COMPILE_THREADS": "1"})
        tasks["backend", "cpu"] = Task(cpu, catalogue(cpu))
        first = tasks.pop(("backend", "cpu"))
        # Right ones first: a wrong timeout ends its job, and what is left takes another.
        run_tasks([first, *sorted(tasks.values(), key=lambda t: "steady" not in t.subject.name)])
        tasks["backend", "cpu"] = first
    return {key: {result.id: result for result in made.results()} for key, made in tasks.items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "name", "check"), cases(), ids=lambda value: value)
def test_a_wrong_plugin_is_rejected_by_the_check_meant_for_it(verdicts, kind, name, check):
    result = verdicts[kind, name][check.format(mutants.plugin_name(name))]
    assert result.outcome == FAIL, result
    assert result.reason
    for unexpected in ("Error:", "ended early", "nothing happened", "only these parts"):
        assert unexpected not in result.reason or name in UNEXPECTED_ERRORS, result.reason


UNEXPECTED_ERRORS = {"ProbeRaises", "WithoutCore"}
"""Where an unexpected error is what is wrong."""


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["backend", "collectives", "precision", "strategy", "tracker"])
def test_the_right_plugin_passes_all_of_these_checks(verdicts, kind):
    wrong = {
        result.id: (result.outcome, result.reason)
        for result in verdicts[kind, f"Steady{kind.capitalize()}"].values()
        if result.outcome != PASS and result.id not in NOT_CLAIMED_BY_CPU
    }
    assert wrong == {}


@pytest.mark.multiprocess
def test_the_host_s_processor_passes_every_level(verdicts):
    card = scorecard(Subject(kind="backend", name="cpu"), verdicts["backend", "cpu"].values())
    assert [result for result in card.results if result.outcome == FAIL] == []
    assert card.levels == dict.fromkeys(("L0", "L1", "L2", "L3", "L4"), PASS)
    assert {result.id for result in card.results if result.outcome == NOT_CLAIMED} == {
        "placement.between-devices",
        "random.per-device",
        "streams.copy",
        "streams.current",
        "streams.events",
        "copies.pinned",
    }
    assert card.count(PASS) > 130


NOT_CLAIMED_BY_CPU = {"copies.pinned", "streams.copy"}
"""What the host's processor does not claim, and some mutants claim wrongly."""


def test_there_are_enough_mutants_of_every_kind():
    kinds = [kind for kind, _, _ in cases()]
    assert len(kinds) >= 60
    assert {kind: kinds.count(kind) >= 6 for kind in set(kinds)} == dict.fromkeys(kinds, True)
