"""What a plugin has been seen to do: one result for each check, as a table and as JSON. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchport.errors import ConfigurationError

PASS, FAIL, NOT_CLAIMED = "pass", "fail", "not claimed"
"""The three outcomes of a check."""

LEVELS = {
    "L0": "package",
    "L1": "object",
    "L2": "collectives",
    "L3": "training",
    "L4": "checkpoint",
}
"""What each level proves."""

VERIFIED_ON = ("hardware", "simulated", "vendor runtime without device", "stub")
"""How a plugin was verified: on its own hardware (a host's processor is its own), on a device simulated in software, on
the vendor's runtime without the device, or against a stub of the vendor's documented API."""

FORMAT = 1
"""Number of the format of the JSON file."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check.

    Attributes:
        id: Name of the check, such as `"memory.peak-resets"`.
        level: One of `LEVELS`.
        title: What it proves, in a sentence.
        outcome: `PASS`, `FAIL` or `NOT_CLAIMED`.
        reason: Why it failed, or why it is not claimed; empty if it passed.
    """

    id: str
    level: str
    title: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    """All results of one plugin.

    Attributes:
        kind: Kind of plugin.
        name: Its name.
        summary: What it says of itself.
        verified_on: One of `VERIFIED_ON`; empty if nobody has said.
        date: Day of the run, `YYYY-MM-DD` (UTC).
        versions: Versions by name: `torchport-core`, the plugin's distribution, `torch`, `python`, and the vendor's
            runtime.
        platform: The machine.
        device_name: Name of the device that it ran on.
        device_count: How many of them there were.
        settings: What the run was told: backend, collectives, launcher, environment.
        results: The results, in order of level.
    """

    kind: str
    name: str
    summary: str = ""
    verified_on: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    platform: str = ""
    device_name: str = ""
    device_count: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.outcome != FAIL for result in self.results)

    @property
    def levels(self) -> dict[str, str]:
        """The outcome of each level that was run: it passes if a check passed and none failed."""
        made = {}
        for level in LEVELS:
            outcomes = {result.outcome for result in self.results if result.level == level}
            if outcomes:
                made[level] = FAIL if FAIL in outcomes else PASS if PASS in outcomes else NOT_CLAIMED
        return made

    def count(self, outcome: str, level: str = "") -> int:
        """Return how many checks had an outcome, in one level or in all."""
        return sum(r.outcome == outcome and level in ("", r.level) for r in self.results)

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        counts = {name: self.count(name) for name in (PASS, FAIL, NOT_CLAIMED)}
        record = {"format": FORMAT, **asdict(self), "levels": self.levels, "counts": counts}
        record["results"] = [
            {key: value for key, value in asdict(result).items() if value or key != "reason"}
            for result in self.results
        ]
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the JSON file, and the folders above it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Scorecard:
        """Read what `write` wrote.

        Raises:
            ConfigurationError: if the file is no scorecard, or one of a newer format.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise ValueError("another format")
            for derived in ("levels", "counts"):
                record.pop(derived)
            results = tuple(Result(**result) for result in record.pop("results"))
            return cls(**record, results=results)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{path} is not a scorecard", reason=str(error), hint="torchport conformance NAME --json FILE"
            ) from error

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return level, id, outcome and title or reason of each check, for a table."""
        return [
            (r.level, r.id, r.outcome, f"{r.title}: {r.reason}" if r.reason else r.title)
            for r in self.results
        ]

    def in_words(self) -> str:
        """Return one line for each level, and one for the whole."""
        lines = []
        for level, outcome in self.levels.items():
            counts = ", ".join(
                f"{self.count(name, level)} {word}"
                for name, word in ((PASS, "passed"), (FAIL, "failed"), (NOT_CLAIMED, "not claimed"))
                if self.count(name, level)
            )
            lines.append(f"{level} {LEVELS[level]:<12} {outcome:<12} {counts}")
        missing = [level for level in LEVELS if level in applicable(self.kind) and level not in self.levels]
        if missing:
            lines.append(f"not run: {', '.join(missing)}")
        return "\n".join(lines)


_APPLICABLE = {
    "backend": ("L0", "L1", "L2", "L3", "L4"),
    "collectives": ("L0", "L2", "L3"),
    "strategy": ("L0", "L3", "L4"),
    "precision": ("L0", "L1", "L3", "L4"),
    "tracker": ("L0", "L1"),
}


def applicable(kind: str) -> tuple[str, ...]:
    """Return the levels that there are for a kind of plugin."""
    return _APPLICABLE.get(kind, ("L0",))


def check_levels(kind: str, levels: Sequence[str]) -> tuple[str, ...]:
    """Return levels in order; all that apply to the kind if none are given.

    Raises:
        ConfigurationError: if there is no such level for plugins of this kind.
    """
    there = applicable(kind)
    for level in levels:
        if level not in there:
            raise ConfigurationError(
                f"there is no level {level!r} for a {kind}",
                found=", ".join(there),
                hint=f"--level {there[0]}",
            )
    return tuple(level for level in there if level in levels or not levels)


def merge(cards: Iterable[Scorecard]) -> list[Scorecard]:
    """Put scorecards of one plugin and run together that were made by several test classes."""
    merged: dict[tuple[str, str], Scorecard] = {}
    for card in cards:
        key = (card.kind, card.name)
        if key in merged:
            from dataclasses import replace

            known = {result.id for result in merged[key].results}
            more = tuple(result for result in card.results if result.id not in known)
            card = replace(merged[key], results=(*merged[key].results, *more))
        merged[key] = card
    return list(merged.values())
