"""A plugin that offers wrong backends, collectives, precisions, strategies and trackers beside right ones.

`MUTANTS` names each, and the check of the kit that must reject it; `STEADY` names those that are right.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import (
    BackendSpec,
    CollectivesSpec,
    PrecisionSpec,
    Probe,
    Requirements,
    StrategySpec,
    TrackerSpec,
    hookimpl,
)

BACKENDS = {
    "OffByOne": "device.index",
    "WrongType": "device.type",
    "MiscountedDevices": "device.count",
    "InitialisedByProbe": "device.probe-leaves-runtime-alone",
    "NeverFreed": "memory.falls",
    "NotCounted": "memory.rises",
    "PeakNeverResets": "memory.peak-resets",
    "PeakIsNow": "memory.peak",
    "FreeAboveTotal": "memory.info",
    "StateNotRestored": "random.state-round-trip",
    "StateOfNobody": "random.state-round-trip",
    "SeedIgnored": "random.seed",
    "AutocastStaysFloat32": "autocast.bfloat16",
    "AutocastToTheOther": "autocast.float16",
    "AutocastStaysOn": "autocast.bfloat16-off",
    "ScalerDisabled": "scaler.unscales",
    "ScalerNeverSkips": "scaler.skips",
    "PinnedInName": "copies.pinned",
    "StreamsInName": "streams.copy",
    "CopiesOnHost": "copies.host-memory",
    "StepsTwice": "step.optimizer",
    "DropsLastBatch": "step.loader",
    "SavesLess": "step.save",
}
COLLECTIVES = {
    "SumIsMax": "all_reduce.sum.float32",
    "ProductIsSum": "all_reduce.product.int64",
    "ReducesCopy": "all_reduce.sum.float32",
    "LosesDtype": "all_gather.int64",
    "GatherReorders": "all_gather.float32",
    "GatherIgnoresStrides": "shapes.non-contiguous",
    "ReducesTheBeginning": "shapes.large",
    "WrongShare": "reduce_scatter.float32",
    "BroadcastsFromZero": "broadcast.float32",
    "ScatterShifts": "scatter.float32",
    "OpenBarrier": "barrier.waits",
    "SharedReferences": "objects.are-copies",
    "ObjectsReordered": "objects.gather",
    "ObjectsFromZero": "objects.broadcast",
    "AverageIsSum": "torch.avg",
    "TakesAnything": "all_reduce.unknown",
    "MiscountedRanks": "group.size",
    "TimeoutIgnored": "timeout.is-an-error",
}
PRECISIONS = {
    "StaysFloat32": "format.context",
    "BindsNothing": "format.model-computes-in-it",
    "NotRestored": "format.restore",
    "StateForgotten": "format.state",
    "CutsGradients": "format.gradients",
    "NeverUnscales": "clipping.single.{}.1",
}
STRATEGIES = {
    "DoesNotSync": "training.{}.no.2",
    "SumsGradients": "training.{}.no.2",
    "OtherNames": "training.{}.no.1",
    "DividesTwice": "accumulation.{}.no.1",
    "ClipsByPart": "clipping.{}.no.1",
    "LosesMomentum": "round-trip.{}.no.1",
    "LoadsNothing": "resume.{}.no.1",
}
TRACKERS = {
    "DropsSteps": "tracker.steps",
    "StepsFromOne": "tracker.steps",
    "NeverFlushes": "tracker.last-record",
    "LosesMetrics": "tracker.several-metrics",
    "NumbersAsTexts": "tracker.numbers",
    "ConfigEndsIt": "tracker.config",
}
PACKAGES = {
    ("backend", "ProbeRaises"): "package.probe",
    ("backend", "ProbeWithoutReason"): "package.probe",
    ("backend", "Incomplete"): "package.complete-class",
    ("tracker", "WithoutSummary"): "package.summary",
    ("tracker", "WithoutHelp"): "package.settings",
    ("tracker", "Heavy"): "package.light-import",
    ("tracker", "WithoutCore"): "package.metadata",
}
"""The last two are in distributions of their own."""


def plugin_name(class_name: str) -> str:
    """`NeverFreed` is offered as `never-freed`."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in class_name).removeprefix("-")


def _of(kind: str, table: Iterable[str]) -> Iterable[dict[str, str]]:
    for name in (f"Steady{kind.capitalize()}", *table):
        yield {
            "name": plugin_name(name),
            "factory": f"mutant_{kind}:{name}",
            "summary": "right" if name.startswith("Steady") else "wrong on purpose",
        }


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer thin layers over the host's own processor."""
    for common in _of("backend", BACKENDS):
        probe = (
            "mutant_backend:initialise"
            if common["name"] == "initialised-by-probe"
            else "mutant_backend:probe"
        )
        yield BackendSpec(**common, probe=probe, device_type="cpu", priority=-1, collectives="gloo")
    wrong = {
        "factory": "mutant_backend:SteadyBackend",
        "summary": "wrong on purpose",
        "device_type": "cpu",
        "priority": -1,
    }
    yield BackendSpec(name="probe-raises", probe="mutant_backend:raises", **wrong)
    yield BackendSpec(name="probe-without-reason", probe="mutant_backend:without_reason", **wrong)
    wrong["factory"] = "mutant_backend:Incomplete"
    yield BackendSpec(name="incomplete", probe="mutant_backend:probe", **wrong)


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer thin layers over gloo."""
    for common in _of("collectives", COLLECTIVES):
        yield CollectivesSpec(**common, device_types=("cpu",))


@hookimpl
def torchport_precisions() -> Iterable[PrecisionSpec]:
    """Offer thin layers over float16 with loss scaling."""
    for common in _of("precision", PRECISIONS):
        yield PrecisionSpec(**common, needs=Requirements(autocast=frozenset({"float16"}), grad_scaler=True))


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer thin layers over a replica in each process."""
    for common in _of("strategy", STRATEGIES):
        yield StrategySpec(**common, needs=Requirements(distributed=True))


@hookimpl
def torchport_trackers() -> Iterable[TrackerSpec]:
    """Offer thin layers over lines of JSON."""
    for common in _of("tracker", TRACKERS):
        yield TrackerSpec(**common)
    yield TrackerSpec(name="without-summary", factory="mutant_tracker:SteadyTracker")
    config = "mutant_config:WithoutHelp"
    yield TrackerSpec(
        name="without-help", factory="mutant_tracker:SteadyTracker", summary="wrong", config=config
    )


def unused() -> Probe:
    """Keep the probe's module out of this one: probes that raise must not be imported with the descriptors."""
    raise NotImplementedError
