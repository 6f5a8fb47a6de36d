"""The classes that a plugin's own tests inherit from. Each check becomes one test."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest

from torchport.plan.registry import Entry
from torchport.testing import package
from torchport.testing.checks import Subject, catalogue, forget
from torchport.testing.runner import Task, run_tasks, scorecard
from torchport.testing.scorecard import FAIL, Result, Scorecard

RESULT = "torchport conformance"
"""Name of the property of a test report that holds the outcome and the reason."""


class PackageConformance:
    """The package level for a whole plugin: light import, valid descriptors, honest probes, metadata.

    Attributes:
        plugin: Entry-point name of the plugin.
        heavy_modules: Top-level modules that importing the plugin must not import, besides torch and what the
            specs' `runtime` distributions contain.
    """

    plugin: ClassVar[str]
    heavy_modules: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture
    def entry_point(self) -> importlib.metadata.EntryPoint:
        """The plugin's announcement in the metadata of its distribution."""
        return package.entry_point_of(self.plugin)

    @pytest.fixture
    def entries(self, entry_point: importlib.metadata.EntryPoint) -> list[Entry]:
        """Everything that the plugin offers."""
        return package.entries_of(self.plugin)

    @pytest.fixture
    def whole(self, entry_point: importlib.metadata.EntryPoint, entries: list[Entry]) -> package.Package:
        """The plugin as a package."""
        return package.Package(entry_point.module, entry_point.dist, entries, self.heavy_modules)

    def test_it_is_registered_and_offers_something(self, whole: package.Package) -> None:
        """All hooks are spelt right, return valid descriptors and clash with no other plugin."""
        package.is_registered_and_offers_something(whole)

    def test_importing_it_is_light(self, whole: package.Package) -> None:
        """Importing the plugin and its configuration imports neither torch nor the vendor's runtime."""
        package.importing_is_light(whole)

    def test_probes_answer_with_a_reason_and_never_raise(self, whole: package.Package) -> None:
        """A probe returns a `Probe`; one that is not available says why."""
        package.probes_answer_with_a_reason(whole)

    def test_factories_name_complete_classes(self, whole: package.Package) -> None:
        """Each factory can be imported and implements every abstract method of its interface."""
        package.factories_name_complete_classes(whole)

    def test_settings_explain_themselves(self, whole: package.Package) -> None:
        """Each configuration dataclass has defaults for every field, and help for every setting."""
        package.settings_explain_themselves(whole)

    def test_specs_have_a_summary(self, whole: package.Package) -> None:
        """`torchport plugins` has a line for each."""
        package.specs_have_a_summary(whole)

    def test_metadata_is_complete(self, whole: package.Package) -> None:
        """The distribution has a summary, a readme, a Python range and the range of cores it is for."""
        package.metadata_is_complete(whole)


class Conformance:
    """What all suites of one kind of plugin share; inherit from one of its subclasses.

    A check that the plugin does not claim is reported as such, with the reason: it neither passes nor fails.

    Attributes:
        kind: Kind of plugin.
        levels: Levels to run; empty means all that apply to the kind.
        verified_on: How the plugin is verified: `"hardware"`, `"simulated"`, `"vendor runtime without device"` or
            `"stub"`.
        launcher: How jobs of several processes are started; empty means automatic.
        processes: Number of processes of these jobs.
        environ: Variables to set in jobs.
        timeout: Seconds that one check may take before it counts as hung.
        tolerance: Greatest relative difference of losses from plain PyTorch on the CPU in float32; 0 takes what the
            number format explains.
        strategies: Names of strategies to train with; empty means those that come with the core.
        precisions: Names of precisions to train in; empty means those that come with the core.
        dtypes: Names of the dtypes that the collectives carry; empty means the usual ones.
        heavy_modules: Modules that importing the plugin must not import, besides torch and its runtime.
    """

    kind: ClassVar[str] = ""
    levels: ClassVar[tuple[str, ...]] = ()
    verified_on: ClassVar[str] = ""
    launcher: ClassVar[str] = ""
    processes: ClassVar[int] = 2
    environ: ClassVar[Mapping[str, str]] = {}
    timeout: ClassVar[float] = 120.0
    tolerance: ClassVar[float] = 0.0
    strategies: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[str, ...]] = ()
    heavy_modules: ClassVar[tuple[str, ...]] = ()

    _ran: ClassVar[dict[str, Result] | None] = None

    @classmethod
    def subject(cls) -> Subject:
        """Describe the plugin under test."""
        name: Any = getattr(cls, str(cls.kind), None)
        if not name:
            raise pytest.UsageError(f"{cls.__qualname__} must name what it tests: {cls.kind} = '...'")
        more: dict[str, Any] = {"dtypes": cls.dtypes} if cls.dtypes else {}
        for slot in ("backend", "collectives"):
            value: Any = getattr(cls, slot, None)
            if slot != cls.kind and value:
                more[slot] = value
        return Subject(
            kind=cls.kind,
            name=name,
            levels=cls.levels,
            verified_on=cls.verified_on,
            launcher=cls.launcher,
            processes=cls.processes,
            environ=cls.environ,
            timeout=cls.timeout,
            tolerance=cls.tolerance,
            strategies=cls.strategies,
            precisions=cls.precisions,
            heavy_modules=cls.heavy_modules,
            **more,
        )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test of each check."""
        if "check_id" in metafunc.fixturenames:
            checks = catalogue(type(self).subject())
            metafunc.parametrize(
                "check_id", [c.id for c in checks], ids=[f"{c.level}-{c.id}" for c in checks]
            )

    def test_conformance(self, check_id: str, request: pytest.FixtureRequest, record_property: Any) -> None:
        """Report the outcome of one check; the first test of a class runs those of all that were selected."""
        result = self._results(request)[check_id]
        record_property(RESULT, [result.outcome, result.reason])
        if result.outcome == FAIL:
            pytest.fail(f"{result.level} {result.id}: {result.title}\n{result.reason}", pytrace=False)

    @classmethod
    def _results(cls, request: pytest.FixtureRequest) -> dict[str, Result]:
        if cls.__dict__.get("_ran") is None:
            wanted = {
                str(item.callspec.params["check_id"])
                for item in request.session.items
                if isinstance(item, pytest.Function) and item.cls is cls and hasattr(item, "callspec")
                if "check_id" in item.callspec.params
            }
            cls._ran = {result.id: result for result in cls.run(wanted).results}
        return cls._ran or {}

    @classmethod
    def run(cls, ids: Iterable[str] | None = None) -> Scorecard:
        """Run checks, all by default, and return the scorecard; `pytest --scorecards DIR` writes it."""
        subject, wanted = cls.subject(), None if ids is None else set(ids)
        checks = [check for check in catalogue(subject) if wanted is None or check.id in wanted]
        task, stubs = Task(subject, checks, suite=cls()), cls.stubs()
        with stubs or contextlib.nullcontext():
            forget()
            run_tasks([task], jobs=stubs is None)
            card = scorecard(subject, task.results())
        forget()
        RAN.append(card)
        return card

    @classmethod
    def stubs(cls) -> AbstractContextManager[Any] | None:
        """Return a context in which stubs stand for the vendor's modules; override it where a suite is run on them.

        Checks of one process then run in this process, and those that take several are not claimed.
        """
        return None


RAN: list[Scorecard] = []
"""The scorecards of all suites that have run in this process."""


class BackendConformance(Conformance):
    """All levels for a backend.

    Attributes:
        backend: Name of the backend.
        collectives: Collectives of jobs of several processes; empty means the backend's own.
    """

    kind = "backend"
    backend: ClassVar[str]
    collectives: ClassVar[str] = ""


class CollectivesConformance(Conformance):
    """Package, collectives and training for collectives.

    Attributes:
        collectives: Their name.
        backend: Backend whose tensors they carry.
    """

    kind = "collectives"
    collectives: ClassVar[str]
    backend: ClassVar[str]


class StrategyConformance(Conformance):
    """Package, training and checkpoints for a strategy.

    Attributes:
        strategy: Its name.
        backend: Backend to train on.
    """

    kind = "strategy"
    strategy: ClassVar[str]
    backend: ClassVar[str] = "cpu"


class PrecisionConformance(Conformance):
    """Package, computation, training and checkpoints for a precision.

    Attributes:
        precision: Its name.
        backend: Backend to train on.
    """

    kind = "precision"
    precision: ClassVar[str]
    backend: ClassVar[str] = "cpu"


class TrackerConformance(Conformance):
    """Package and records for a tracker.

    Attributes:
        tracker: Its name.
    """

    kind = "tracker"
    tracker: ClassVar[str]
