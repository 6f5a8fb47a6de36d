"""The tables of the conformance kit's pages: what has been verified, from committed scorecards, and the checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torchport.plan.discovery import discover
from torchport.testing.checks import Subject, catalogue
from torchport.testing.scorecard import FAIL, LEVELS, NOT_CLAIMED, PASS, Scorecard, applicable

SCORECARDS = Path(__file__).resolve().parent / "scorecards"
WORDS = {
    "hardware": "verified on hardware",
    "simulated": "verified on a simulated device",
    "vendor runtime without device": "verified on the vendor's runtime without the device",
    "stub": "verified against a stub of the vendor's documented API",
}
_KINDS = ("backend", "collectives", "strategy", "precision", "tracker", "launcher", "quantizer")
_DTYPES = re.compile(r"\.(?:float32|float16|bfloat16|int32|int64|uint8|bool)\b")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def support(folder: Path = SCORECARDS) -> str:
    """One row for each committed scorecard.

    Raises:
        ValueError: if a scorecard does not say how it was verified, has a failed check, or has another file name.
    """
    cards = []
    for path in sorted(folder.glob("*.json")):
        card = Scorecard.read(path)
        if path.stem != f"{card.kind}-{card.name}":
            raise ValueError(f"{path.name} is the scorecard of the {card.kind} {card.name}")
        if card.verified_on not in WORDS:
            raise ValueError(f"{path.name} does not say how it was verified: --verified-on")
        if not card.passed:
            raise ValueError(
                f"{path.name} has failed checks: {[r.id for r in card.results if r.outcome == FAIL]}"
            )
        cards.append(card)
    cards.sort(key=lambda card: (_KINDS.index(card.kind), card.name))
    header = ("plugin", "kind", "support", "passed", "not run", "not claimed", "on", "date", "versions")
    return _table(header, [_support_row(card) for card in cards])


def _support_row(card: Scorecard) -> tuple[str, ...]:
    passed = [
        f"{level} ({card.count(PASS, level)})" for level, outcome in card.levels.items() if outcome == PASS
    ]
    absent = [level for level in applicable(card.kind) if card.levels.get(level) != PASS]
    unclaimed = [f"`{result.id}`" for result in card.results if result.outcome == NOT_CLAIMED]
    shown = unclaimed if len(unclaimed) <= 8 else [*unclaimed[:7], f"{len(unclaimed) - 7} more"]
    where = (
        f"{card.device_count} x {card.device_name}, {card.platform}" if card.device_name else card.platform
    )
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items() if version)
    return (
        f"[`{card.name}`](scorecards/{card.kind}-{card.name}.json)",
        card.kind,
        WORDS[card.verified_on],
        ", ".join(passed),
        ", ".join(absent) or "-",
        ", ".join(shown) or "-",
        where,
        card.date,
        versions,
    )


def levels() -> str:
    """Which levels there are for a kind of plugin."""
    rows = []
    for kind in _KINDS:
        there = applicable(kind)
        rows.append((kind, *("yes" if level in there else "-" for level in LEVELS)))
    return _table(("kind", *(f"{level} {name}" for level, name in LEVELS.items())), rows)


def checks() -> str:
    """Every check, those of several dtypes or trainings in one row."""
    examples = {"backend": "cpu", "precision": "bf16", "tracker": "jsonl"}
    installed = discover({})
    rows: dict[tuple[str, str], str] = {}
    for kind, name in examples.items():
        assert name in installed.entries[kind]
        subject = Subject(kind=kind, name=name, backend="cpu")
        for check in catalogue(subject):
            label, title = check.id, check.title
            dtype = _DTYPES.search(label)
            if dtype and check.level == "L2":
                label, title = label.replace(dtype[0], ".DTYPE"), title.replace(f" of {dtype[0][1:]}", "")
            if check.level in ("L3", "L4"):
                label = re.sub(r"^([a-z-]+)\.[a-z]+\.[a-z0-9]+\.\d$", r"\1.STRATEGY.PRECISION.N", label)
                label = re.sub(r"^kill-mid-save\..*", "kill-mid-save.STRATEGY", label)
                title = re.sub(r" \(.*\)$| of single| under ddp| of ddp| under single", "", title)
            rows.setdefault((check.level, label), f"{title}{f' ({kind})' if check.level == 'L1' else ''}")
    return _table(
        ("level", "check", "proves"), [(level, f"`{id}`", title) for (level, id), title in rows.items()]
    )
