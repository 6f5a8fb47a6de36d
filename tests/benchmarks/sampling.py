"""Measure contestants in turn, and compare each with the baseline of the same round.

A round measures every contestant once; the next round starts with the next contestant. What loads the machine for
a while then loads all of them, and the ratio of two measurements of one round hardly depends on it. The figures
are medians and quartiles over rounds of these paired ratios, not ratios of the best times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def in_turn(contestants: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield contestants round by round, each round starting one further: A B C, B C A, C A B, …"""
    for number in range(rounds):
        first = number % len(contestants)
        yield from contestants[first:]
        yield from contestants[:first]


def alternate(measure: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each contestant's `measure`, which returns a duration in seconds, once a round."""
    taken: dict[str, list[float]] = {name: [] for name in measure}
    for name in in_turn(list(measure), rounds):
        taken[name].append(measure[name]())
    return taken


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, statistics.median(values), high)


@dataclass(frozen=True)
class Budget:
    """A limit on what Torchport may take: of its own time, its ratio to, or its distance from another's."""

    kind: str  # "ratio", "difference" or "absolute"
    limit: float
    against: str = ""

    def value(self, taken: Mapping[str, Sequence[float]]) -> float:
        """Return the median of what is limited: a ratio, or seconds."""
        return statistics.median(self._values(taken))

    def interval(self, taken: Mapping[str, Sequence[float]]) -> tuple[float, float]:
        """Return where the median lies with a confidence of 95 %.

        Between two of the ordered values, whatever their distribution: the number of values below the true median is
        binomial, whose standard deviation is half the square root of their number.
        """
        values = sorted(self._values(taken))
        number = len(values)
        reach = 1.96 * math.sqrt(number) / 2
        low, high = math.floor(number / 2 - reach), math.ceil(number / 2 + reach)
        return values[max(low - 1, 0)], values[min(high, number - 1)]

    def _values(self, taken: Mapping[str, Sequence[float]]) -> list[float]:
        ours = taken["torchport"]
        if self.kind == "absolute":
            return list(ours)
        pairs = zip(ours, taken[self.against], strict=True)
        if self.kind == "ratio":
            return [a / b for a, b in pairs]
        return [a - b for a, b in pairs]

    def describe(self) -> str:
        if self.kind == "ratio":
            return f"≤ {self.limit:g} x {self.against}"
        if self.kind == "difference":
            return f"≤ {self.against} + {self.limit:g} s"
        return f"≤ {self.limit:g} s"


@dataclass
class Result:
    """What one benchmark measured.

    Attributes:
        name: Short name, also that of the JSON entry.
        title: What was measured, for readers.
        taken: Seconds by contestant, one for each round.
        baseline: The contestant that the others are compared with.
        unit: Name of what is shown, such as `µs a step`.
        scale: What seconds are multiplied by to be shown.
        amount: If given, what each measurement handled; `amount / seconds` is shown instead.
        budget: Torchport's limit, if it has one.
        notes: What a reader should know.
    """

    name: str
    title: str
    taken: dict[str, list[float]]
    baseline: str
    unit: str = "s"
    scale: float = 1.0
    amount: float | None = None
    budget: Budget | None = None
    notes: list[str] = field(default_factory=list)

    def shown(self, contestant: str) -> float:
        """Return the median in the result's unit."""
        seconds = statistics.median(self.taken[contestant])
        return seconds * self.scale if self.amount is None else self.amount / seconds

    def ratio(self, contestant: str) -> Spread:
        """Return the spread of paired ratios to the baseline."""
        pairs = zip(self.taken[contestant], self.taken[self.baseline], strict=True)
        return Spread.of([a / b for a, b in pairs])

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; `None` without one."""
        return None if self.budget is None else self.budget.value(self.taken) <= self.budget.limit

    def as_json(self) -> dict[str, Any]:
        rows = {}
        for name, seconds in self.taken.items():
            spread, ratio = Spread.of(seconds), self.ratio(name)
            rows[name] = {
                "seconds": [_round(x) for x in (spread.low, spread.median, spread.high)],
                "ratio": [round(x, 4) for x in (ratio.low, ratio.median, ratio.high)],
                "shown": _round(self.shown(name)),
            }
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "baseline": self.baseline,
            "rounds": len(next(iter(self.taken.values()))),
            "contestants": rows,
            "notes": self.notes,
        }
        if self.budget is not None:
            entry["budget"] = {
                "text": self.budget.describe(),
                "limit": self.budget.limit,
                "value": _round(self.budget.value(self.taken)),
                "interval": [_round(bound) for bound in self.budget.interval(self.taken)],
                "met": self.met,
            }
        return entry


def _round(value: float) -> float:
    return float(f"{value:.4g}")
