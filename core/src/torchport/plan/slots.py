"""How each slot of a plan is filled: what was asked for if it can work here, else the best that can.

Nothing that was asked for is ever replaced by something else. No function here branches on a plugin's name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchport.errors import AmbiguousError, IncompatibleError, UnavailableError
from torchport.plan.decision import AUTOMATIC, Decision, Rejection
from torchport.plan.registry import Installed
from torchport.plan.request import Ask, Sources, find_spec, slot_kind, slot_variable, split_names
from torchport.plugin.specs import BackendSpec, Spec, Topology

ALL = "all"
"""What stands for every tracker that works here."""

_LEFT_OUT = "taken only when asked for"


def fill_backend(sources: Sources) -> Decision:
    """Take the backend that was asked for, else the highest priority among those that are available."""
    ask = sources.ask("backend")
    if ask is not None:
        return _as_asked("backend", ask, sources)
    installed = sources.installed
    available, rejected = [], []
    for spec in installed.specs("backend"):
        probe = installed.probe(spec)
        if probe.available:
            available.append(spec)
        else:
            rejected.append(Rejection(spec.name, probe.reason))
    rejected += [
        Rejection(f"plugin {failure.plugin.name}", f"could not be registered: {failure.reason}")
        for failure in installed.failures
    ]
    rejected += [Rejection(f"plugin {name}", reason) for name, reason in sorted(installed.denied.items())]
    rejected += [
        Rejection(name, f"offered by {' and by '.join(map(str, plugins))}")
        for (kind, name), plugins in sorted(installed.clashes.items())
        if kind == "backend"
    ]
    return _highest("backend", available, rejected, sources, "the highest priority that is available")


def check_processes(decision: Decision, backend: BackendSpec, topology: Topology) -> None:
    """Refuse a job of several processes on devices of which each job has one.

    Raises:
        IncompatibleError: with the backend's own reason.
    """
    if topology.world_size > 1 and backend.single_process:
        raise IncompatibleError(
            f"a job of {topology.world_size} processes on the backend {backend.name!r} ({decision.source})",
            reason=backend.single_process,
            hint=f"start one process, or choose another backend: export {slot_variable('backend')}=...",
        )


def fill_strategy(sources: Sources, backend: BackendSpec, topology: Topology) -> Decision:
    """Take the strategy that was asked for, else the one that fits the number of processes."""
    processes = topology.world_size
    count = f"{processes} process{'es' * (processes != 1)}"
    ask = sources.ask("strategy")
    if ask is not None:
        decision = _as_asked("strategy", ask, sources)
        limit = getattr(decision.spec, "max_processes", 0)
        if limit and processes > limit:
            raise IncompatibleError(
                f"{ask.source} asks for the strategy {decision.name!r} in a job of {count}",
                reason=f"it runs on at most {limit}: every process would train a model of its own",
                hint=f"leave the choice to Torchport (no strategy=, no {slot_variable('strategy')}),"
                f" or start {limit} process{'es' * (limit != 1)}",
            )
        return _check_needs(decision, backend, sources.installed)
    fitting, rejected = [], []
    for spec in sources.installed.specs("strategy"):
        if spec.priority <= 0:
            rejected.append(Rejection(spec.name, _LEFT_OUT))
        elif processes < spec.min_processes or (spec.max_processes and processes > spec.max_processes):
            rejected.append(Rejection(spec.name, f"not for {count}"))
        elif lacking := _lacking(spec, backend, sources.installed):
            rejected.append(Rejection(spec.name, f"backend {backend.name!r} has no {_and_no(lacking)}"))
        else:
            fitting.append(spec)
    return _highest("strategy", fitting, rejected, sources, f"fits {count}")


def fill_precision(sources: Sources, backend: BackendSpec, strategy: Decision | None = None) -> Decision:
    """Take the precision that was asked for, else that of the strategy's settings, else the default one."""
    ask = sources.ask("precision")
    if ask is None and strategy is not None:
        wanted = getattr(strategy.config, "precision", "")
        ask = Ask(wanted, f"the settings of strategy {strategy.name!r}") if wanted else None
    if ask is not None:
        return _check_needs(_as_asked("precision", ask, sources), backend, sources.installed)
    specs = sources.installed.specs("precision")
    defaults = [spec for spec in specs if spec.default]
    if len(defaults) != 1:
        raise AmbiguousError(
            "no precision was asked for, and exactly one installed precision must be the default",
            found=", ".join(spec.name for spec in defaults) or "none",
            hint=f"export {slot_variable('precision')}=...",
        )
    return Decision(
        slot="precision",
        choice=(defaults[0].name,),
        source=f"{AUTOMATIC}: the default",
        specs=(defaults[0],),
        config=sources.settings_of(defaults[0]),
        rejected=tuple(Rejection(spec.name, _LEFT_OUT) for spec in specs if spec is not defaults[0]),
    )


def fill_collectives(sources: Sources, backend: BackendSpec, *, distributed: bool) -> Decision:
    """Take the collectives that were asked for, else the backend's own; none without a process group."""
    ask = sources.ask("collectives")
    if not distributed:
        note = f"; {ask.source} has no effect" if ask is not None else ""
        return Decision(slot="collectives", choice=(), source=f"not needed by one process{note}")
    if ask is None:
        if not backend.collectives:
            raise IncompatibleError(
                f"a job of several processes on the backend {backend.name!r}",
                reason="the backend names no collectives",
                hint=f"start one process, or name some: export {slot_variable('collectives')}=...",
            )
        ask = Ask(backend.collectives, f"{AUTOMATIC}: the default of backend {backend.name!r}")
    decision = _as_asked("collectives", ask, sources)
    types = getattr(decision.spec, "device_types", ())
    if types and backend.device_type not in types:
        raise IncompatibleError(
            f"{ask.source} asks for the collectives {decision.name!r} on the backend {backend.name!r}",
            reason=f"they carry tensors of {', '.join(types)}, not of {backend.device_type}",
            hint=f"{slot_variable('collectives')}={backend.collectives}" if backend.collectives else "",
        )
    why = "not the backend's default" if decision.automatic else "another was asked for"
    others = [spec for spec in sources.installed.specs("collectives") if spec is not decision.spec]
    return replace(decision, rejected=tuple(Rejection(spec.name, why) for spec in others))


def fill_launcher(sources: Sources, features: frozenset[str]) -> Decision:
    """Take the launcher that was asked for, else the highest priority among those with these features.

    Raises:
        IncompatibleError: if the one that was asked for lacks a feature.
    """
    specs = sources.installed.specs("launcher")
    able = [spec for spec in specs if features <= spec.features]
    ask = sources.ask("launcher")
    if ask is not None:
        decision = _as_asked("launcher", ask, sources)
        lacking = features - getattr(decision.spec, "features", frozenset())
        if lacking:
            raise IncompatibleError(
                f"{ask.source} asks for the launcher {decision.name!r}",
                reason=f"it cannot do: {', '.join(sorted(lacking))}",
                hint=f"one of: {', '.join(spec.name for spec in able)}" if able else "",
            )
        return decision
    rejected = []
    for spec in specs:
        if spec.priority <= 0:
            rejected.append(Rejection(spec.name, _LEFT_OUT))
        elif spec not in able:
            rejected.append(Rejection(spec.name, f"cannot do: {', '.join(sorted(features - spec.features))}"))
    candidates = [spec for spec in able if spec.priority > 0]
    return _highest("launcher", candidates, rejected, sources, "the simplest that can do what is asked")


def fill_trackers(sources: Sources) -> Decision:
    """Take the trackers that were asked for, none otherwise; `all` stands for every one that works here."""
    ask = sources.ask("trackers")
    if ask is None:
        return _empty("trackers")
    names = split_names(ask.value)
    chosen = {}
    for name in names:
        if name.lower() != ALL:
            spec = find_spec("tracker", name, ask.source, sources.installed)
            chosen[spec.name] = _available("trackers", spec, ask, sources)
    implied, rejected = [], []
    for spec in sources.installed.specs("tracker") if ALL in map(str.lower, names) else ():
        probe = sources.installed.probe(spec)
        if not probe.available:
            rejected.append(Rejection(spec.name, probe.reason))
        elif spec.name not in chosen:
            chosen[spec.name] = spec
            implied.append(spec.name)
    return Decision(
        slot="trackers",
        choice=tuple(chosen),
        source=ask.source,
        specs=tuple(chosen.values()),
        rejected=tuple(rejected),
        implied=tuple(implied),
    )


def fill_optional(slot: str, sources: Sources) -> Decision:
    """Take what was asked for; leave the slot empty if nothing was."""
    ask = sources.ask(slot)
    return _empty(slot) if ask is None else _as_asked(slot, ask, sources)


def fill_quantizer(sources: Sources, backend: BackendSpec) -> Decision:
    """Take the quantizer that was asked for, none otherwise."""
    decision = fill_optional("quantizer", sources)
    return decision if decision.spec is None else _check_needs(decision, backend, sources.installed)


def needs_process_group(strategy: Decision, topology: Topology) -> bool:
    """Whether a process group is opened: for several processes, or because the strategy always wants one."""
    needs = getattr(strategy.spec, "needs", None)
    return topology.world_size > 1 or (needs is not None and needs.distributed)


# --- shared steps -------------------------------------------------------------------------------------------


def _empty(slot: str) -> Decision:
    return Decision(slot=slot, choice=(), source="not asked for")


def _as_asked(slot: str, ask: Ask, sources: Sources) -> Decision:
    """Take what was asked for; refuse with the probe's own reason if it cannot be used here."""
    spec = find_spec(slot_kind(slot), ask.value, ask.source, sources.installed)
    _available(slot, spec, ask, sources)
    return Decision(
        slot=slot,
        choice=(spec.name,),
        source=ask.source,
        specs=(spec,),
        config=sources.settings_of(spec, ask.value),
    )


def _available(slot: str, spec: Any, ask: Ask, sources: Sources) -> Any:
    """Return `spec` if its probe says that it can be used now."""
    probe = sources.installed.probe(spec)
    if not probe.available:
        raise UnavailableError(
            f"{ask.source} asks for the {spec.kind} {spec.name!r}, which is installed but unusable here",
            reason=probe.reason,
            hint=f"torchport doctor, or another {spec.kind}: torchport plugins --kind {spec.kind}",
        )
    return spec


def _highest(
    slot: str, candidates: list[Any], rejected: list[Rejection], sources: Sources, why: str
) -> Decision:
    """Take the candidate with the highest priority; refuse to guess between equals."""
    if not candidates:
        raise UnavailableError(
            f"no {slot} can be chosen automatically",
            found="; ".join(f"{item.name}: {item.reason}" for item in rejected) or f"no {slot} is installed",
            hint="torchport doctor" if rejected else "pip install torchport (which brings the cpu backend)",
        )
    top = max(spec.priority for spec in candidates)
    best, *equals = (spec for spec in candidates if spec.priority == top)
    if equals:
        names = " and ".join(repr(spec.name) for spec in (best, *equals))
        raise AmbiguousError(
            f"no {slot} was asked for, and {names} are equally good (priority {top})",
            hint=f"say which: export {slot_variable(slot)}={best.name}",
        )
    lower = [
        Rejection(spec.name, f"lower priority ({spec.priority} < {top})")
        for spec in candidates
        if spec is not best
    ]
    return Decision(
        slot=slot,
        choice=(best.name,),
        source=f"{AUTOMATIC}: {why}",
        specs=(best,),
        config=sources.settings_of(best),
        rejected=(*rejected, *lower),
    )


def _lacking(spec: Any, backend: BackendSpec, installed: Installed) -> tuple[str, ...]:
    """Name what `spec` needs and the backend's device cannot do; the backend is asked only if need be."""
    return () if spec.needs.empty else spec.needs.missing(installed.capabilities(backend))


def _and_no(lacking: tuple[str, ...]) -> str:
    return " and no ".join(lacking)


def _check_needs(decision: Decision, backend: BackendSpec, installed: Installed) -> Decision:
    """Refuse a choice whose needs the backend's device does not meet."""
    spec: Spec | None = decision.spec
    lacking = _lacking(spec, backend, installed)
    if lacking:
        raise IncompatibleError(
            f"{decision.source} asks for the {decision.slot} {decision.name!r}"
            f" on the backend {backend.name!r}",
            reason=f"the backend has no {_and_no(lacking)}",
            hint=f"another {decision.slot} or another backend: torchport plugins",
        )
    return decision
