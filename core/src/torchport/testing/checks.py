"""What a check is, and what it is told about the plugin under test. Imports no torch."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torchport.errors import ConfigurationError
from torchport.plan.discovery import discover
from torchport.plan.registry import CORE, Entry, Installed, load_reference
from torchport.testing.scorecard import VERIFIED_ON, check_levels

HERE, ONE, SEVERAL, KILLED, AGAIN, LATE = "here", "one", "several", "killed", "again", "late"
"""Where the parts of checks run: in this process; in a job of one process; in a job of several; in one process that is
killed; in one process after all these; in a job whose processes wait for each other in vain."""

PHASES = (ONE, SEVERAL, KILLED, AGAIN, LATE)
"""The jobs of a run, in order."""


class NotClaimed(Exception):
    """Raised by a check for what the plugin does not claim to do; its text is the reason."""


class CheckFailure(AssertionError):
    """Raised by a check when the plugin does not do what it must."""


def require(condition: object, message: str) -> None:
    """Fail the check with a message unless a condition holds.

    Raises:
        CheckFailure: if it does not.
    """
    if not condition:
        raise CheckFailure(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The plugin under test, and what its author says about the test.

    Attributes:
        kind: Kind of plugin.
        name: Its name.
        levels: Levels to run; empty means all that apply.
        backend: Backend on whose device collectives, strategies and precisions are tested; for a backend, its name.
        collectives: Collectives of jobs of several processes; empty means the backend's own.
        strategies: Strategies to train with; empty means those that come with the core (for a strategy: itself).
        precisions: Precisions to train in; empty means those that come with the core (for a precision: itself).
        launcher: How jobs of several processes are started; empty means automatic.
        processes: Number of processes of these jobs.
        dtypes: Names of the dtypes that the collectives carry.
        tolerance: Greatest relative difference of losses from those of plain PyTorch on the CPU in float32, where
            the number format does not tell it by itself.
        environ: Variables to set in jobs.
        timeout: Seconds that a single check may take.
        heavy_modules: Modules that importing the plugin must not import, besides torch and its runtime.
        verified_on: One of `torchport.testing.scorecard.VERIFIED_ON`.
    """

    kind: str
    name: str
    levels: tuple[str, ...] = ()
    backend: str = ""
    collectives: str = ""
    strategies: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    launcher: str = ""
    processes: int = 2
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")
    tolerance: float = 0.0
    environ: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 120.0
    heavy_modules: tuple[str, ...] = ()
    verified_on: str = ""

    def __post_init__(self) -> None:
        if self.verified_on not in ("", *VERIFIED_ON):
            raise ConfigurationError(
                f"verified_on is {self.verified_on!r}", hint=f"one of: {', '.join(VERIFIED_ON)}"
            )
        object.__setattr__(self, "levels", check_levels(self.kind, self.levels))
        own = {"backend": "backend", "collectives": "collectives"}.get(self.kind)
        if own:
            object.__setattr__(self, own, self.name)
        lists = {"strategy": "strategies", "precision": "precisions"}.get(self.kind)
        if lists:
            object.__setattr__(self, lists, (self.name,))
        if not self.precisions:
            object.__setattr__(self, "precisions", _of_the_core("precision"))
        if not self.strategies:
            object.__setattr__(self, "strategies", _of_the_core("strategy"))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Subject:
        """Restore what `to_json` returned."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)

    @property
    def entry(self) -> Entry:
        """The descriptor of the plugin, and where it comes from.

        Raises:
            SelectionError: if there is no such plugin.
            PluginError: if it could not be registered.
        """
        return everything().find(self.kind, self.name, "the conformance kit")


def everything() -> Installed:
    """Discover what is installed, with every plugin switched on."""
    return _discovered(tuple(sys.path))


def forget() -> None:
    """Discover anew when asked again: stubs have come or gone."""
    _discovered.cache_clear()


@functools.lru_cache(maxsize=1)
def _discovered(path: tuple[str, ...]) -> Installed:
    return discover({})


def _of_the_core(kind: str) -> tuple[str, ...]:
    """Name the plugins of a kind that come with the core; the default one first."""
    entries = [entry for entry in everything().entries[kind].values() if entry.plugin.distribution == CORE]
    entries.sort(
        key=lambda e: (
            not getattr(e.spec, "default", False),
            getattr(e.spec, "min_processes", 0),
            e.spec.name,
        )
    )
    return tuple(entry.spec.name for entry in entries)


def build_plugin(entry: Entry) -> Any:
    """Build the object of a descriptor, with its default settings."""
    config = load_reference(entry.spec.config)() if entry.spec.config else None
    return load_reference(entry.spec.factory)(entry.spec, config)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a check runs.

    Attributes:
        phase: One of `PHASES`, or `HERE`.
        rank: Index of this process.
        world_size: Number of processes of the job.
        folder: A folder that all jobs of a run share.
        tell: Writes down, for whoever started the job, that this process is about to end by itself.
        forks: Whether checks may fork this process.
        suite: The author's own suite, for checks that need to be told more than a subject holds (`HERE` only).
    """

    phase: str
    folder: Path
    rank: int = 0
    world_size: int = 1
    tell: Callable[[str], None] = lambda event: None
    forks: bool = True
    suite: Any = None


Bench = Callable[["Subject", Place], AbstractContextManager[Any]]
Part = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to prove.

    Attributes:
        id: Its name.
        level: One of `torchport.testing.scorecard.LEVELS`.
        title: What it proves, in a sentence.
        parts: What to do, by where it is done; all of it must go well. Each part is given what `bench` opens.
        bench: Opens what the parts work with; checks with the same bench share it.
        unclaimed: Returns why the subject does not claim it, as far as that can be told beforehand, or an empty text.
    """

    id: str
    level: str
    title: str
    parts: Mapping[str, Part]
    bench: Bench
    unclaimed: Callable[[Subject], str] | None = None


@contextmanager
def plain_bench(subject: Subject, place: Place) -> Iterator[tuple[Subject, Place]]:
    """Give a check the subject and the place, and nothing else."""
    yield subject, place


class Checks(list[Check]):
    """The checks of a module, in order; `checks(id, title)` is a decorator that adds one."""

    def __init__(
        self, level: str, bench: Bench, phase: str = ONE, unclaimed: Callable[[Subject], str] | None = None
    ) -> None:
        super().__init__()
        self.level, self.bench, self.phase, self.unclaimed = level, bench, phase, unclaimed

    def __call__(self, id: str, title: str, phase: str = "") -> Callable[[Part], Part]:
        """Add a check of one part."""

        def add(function: Part) -> Part:
            parts = {phase or self.phase: function}
            self.append(Check(id, self.level, title, parts, self.bench, self.unclaimed))
            return function

        return add

    def each(
        self, id: str, title: str, values: tuple[Any, ...]
    ) -> Callable[[Callable[[Any, Any], None]], Any]:
        """Add a check for each of some values, which stand in `{}` of the id and the title."""

        def add(function: Callable[[Any, Any], None]) -> Any:
            for value in values:
                part = functools.partial(_with, function, value)
                parts = {self.phase: part}
                name, said = id.format(value), title.format(value)
                self.append(Check(name, self.level, said, parts, self.bench, self.unclaimed))
            return function

        return add


def _with(function: Callable[[Any, Any], None], value: Any, bench: Any) -> None:
    function(bench, value)


_MODULES = {
    ("L0", ""): "package",
    ("L1", "backend"): "device",
    ("L1", "precision"): "formats",
    ("L1", "tracker"): "trackers",
    ("L2", ""): "collectives",
    ("L3", ""): "training",
    ("L4", ""): "checkpoints",
}


def catalogue(subject: Subject) -> list[Check]:
    """Return the checks of a subject, in order of level; imports the modules of these levels."""
    found: list[Check] = []
    for level in subject.levels:
        name = _MODULES.get((level, subject.kind)) or _MODULES[level, ""]
        found += importlib.import_module(f"torchport.testing.{name}").checks(subject)
    return found


def find_suite(reference: str, subject: Subject, told: Mapping[str, Any]) -> tuple[Subject, Any]:
    """Return the settings and an instance of the author's own suite, with those of `told` in their place.

    Args:
        reference: `"module:Class"`; empty looks among the suites of the core's own plugins.
        subject: What was asked for.
        told: The settings that were asked for.
    """
    from torchport.testing import own

    found = load_reference(reference) if reference else own.SUITES.get((subject.kind, subject.name))
    if found is None:
        return subject, None
    return replace(found.subject(), **told), found()


def subject_with(subject: Subject, **changes: Any) -> Subject:
    """Return a subject with other settings."""
    return replace(subject, **changes)


def as_text(subject: Subject) -> str:
    """Return a subject as one line of JSON."""
    return json.dumps(subject.to_json())
