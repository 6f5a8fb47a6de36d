"""From a request, the environment and what is installed to a frozen, explained `Plan`.

`plan()` is a pure function: it imports no torch and keeps no state. Whatever looks at the machine (probes,
capabilities) is asked of `Installed`, so that the whole table of decisions can be tested without hardware.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from torchport import envvars
from torchport.config import schema
from torchport.errors import (
    AmbiguousError,
    ConfigurationError,
    IncompatibleError,
    UnavailableError,
)
from torchport.plan.registry import Installed, load_reference
from torchport.plugin.specs import KINDS, BackendSpec, Requirements, Spec, Topology

SLOTS = ("backend", "strategy", "precision", "collectives", "launcher", "trackers", "quantizer")
"""The slots of a plan, in the order in which they are shown."""

AUTOMATIC = "automatic"


def slot_variable(slot: str) -> str:
    """Return the environment variable that fills a slot."""
    return KINDS[_kind(slot)].variable


def _kind(slot: str) -> str:
    return "tracker" if slot == "trackers" else slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, by argument and by configuration file.

    Attributes:
        arguments: By slot: a name, an instance of a plugin's configuration dataclass, or (trackers) names.
        configured: By slot: a name from a configuration file.
        asked_by: Who gave the arguments, for messages.
        config_file: Where `configured` was read, for messages.
        settings: By YAML section (`"fsdp_config"`): the plugin settings of a configuration file.
        handlers: Configuration objects given besides the slots, used where a chosen spec's `config` names
            their class.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    configured: Mapping[str, str] = field(default_factory=dict)
    asked_by: str = "argument"
    config_file: str = "configuration file"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    handlers: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How one slot was filled.

    Attributes:
        slot: Name of the slot.
        choice: Names chosen: one, none where the slot is not needed, several for trackers.
        source: Who decided: an argument, a variable, a file, or `"automatic"`, with the reason.
        spec: Descriptor of the first choice; `None` if there is none.
        config: The chosen plugin's settings.
        rejected: The other candidates, each with its reason.
    """

    slot: str
    choice: tuple[str, ...]
    source: str
    spec: Spec | None = None
    config: Any = None
    rejected: tuple[Rejection, ...] = ()

    @property
    def name(self) -> str:
        """The choice as text; `"-"` where the slot stays empty."""
        return ", ".join(self.choice) or "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The frozen choices of a run, and why each was made.

    Attributes:
        decisions: One for each slot, in the order of `SLOTS`.
        topology: The place of this process in its job.
        overrides: One sentence for each variable that an argument overrides.
        warnings: What discovery wants the operator to know.
        distributed: Whether a process group is opened.
    """

    decisions: tuple[Decision, ...]
    topology: Topology
    distributed: bool
    overrides: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __getitem__(self, slot: str) -> Decision:
        for decision in self.decisions:
            if decision.slot == slot:
                return decision
        raise KeyError(slot)

    @property
    def backend(self) -> str:
        """Name of the chosen backend."""
        return self["backend"].name

    @property
    def strategy(self) -> str:
        """Name of the chosen strategy."""
        return self["strategy"].name

    @property
    def precision(self) -> str:
        """Name of the chosen precision."""
        return self["precision"].name

    @property
    def collectives(self) -> str:
        """Name of the chosen collectives; `"-"` where no process group is opened."""
        return self["collectives"].name

    @property
    def distributed_type(self) -> str:
        """Label of the kind of distributed training (`DistributedType`)."""
        backend, strategy = self["backend"].spec, self["strategy"].spec
        label = getattr(strategy, "distributed_type", "")
        return label or (getattr(backend, "distributed_type", "") if self.topology.world_size > 1 else "") or "NO"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "slots": {
                d.slot: {
                    "choice": list(d.choice),
                    "source": d.source,
                    "settings": plain(d.config),
                    "rejected": [asdict(r) for r in d.rejected],
                }
                for d in self.decisions
            },
            "topology": asdict(self.topology),
            "distributed_type": self.distributed_type,
            "overrides": list(self.overrides),
            "warnings": list(self.warnings),
        }

    def fingerprint(self) -> dict[str, str]:
        """Return what all processes must agree on, by slot: the choice, and a digest of its settings."""
        shared = {}
        for decision in self.decisions:
            settings = json.dumps(plain(decision.config), sort_keys=True, default=repr)
            digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
            shared[decision.slot] = decision.name + (f" (settings {digest})" if decision.config is not None else "")
        shared["processes"] = str(self.topology.world_size)
        return shared


def plain(value: Any) -> Any:
    """Turn settings into values that JSON can hold; objects without a plain form become their type's name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in schema.settings_of(type(value))}
    return getattr(value, "__qualname__", None) or type(value).__qualname__


@dataclass(frozen=True, slots=True)
class _Ask:
    """A value for a slot and who gave it."""

    value: Any
    source: str


def plan(
    request: Request, environment: Mapping[str, str], installed: Installed, topology: Topology
) -> Plan:
    """Fill every slot, or say exactly why one cannot be filled.

    An argument comes before the environment, the environment before the configuration file, and that before
    automatic choice. Nothing that was asked for is ever replaced by something else.

    Args:
        request: Arguments and the contents of a configuration file.
        environment: Environment variables.
        installed: What discovery found.
        topology: The place of this process in its job.

    Raises:
        SelectionError: if a slot cannot be filled.
        ConfigurationError: if a plugin's settings are not valid.
    """
    overrides: list[str] = []
    asks = {slot: _ask(slot, request, environment, installed, overrides) for slot in SLOTS}
    settings = _Settings(request, environment)

    backend = _choose_backend(asks["backend"], installed, settings)
    assert isinstance(backend.spec, BackendSpec)
    strategy = _choose_strategy(asks["strategy"], installed, settings, backend.spec, topology)
    precision = _choose_precision(asks["precision"], installed, settings, backend.spec)
    distributed = topology.world_size > 1 or _needs(strategy).distributed
    collectives = _choose_collectives(asks["collectives"], installed, settings, backend.spec, distributed)
    decisions = (
        backend,
        strategy,
        precision,
        collectives,
        _choose_named("launcher", asks["launcher"], installed, settings),
        _choose_trackers(asks["trackers"], installed),
        _choose_named("quantizer", asks["quantizer"], installed, settings),
    )
    made = Plan(
        decisions=decisions,
        topology=topology,
        distributed=distributed,
        overrides=tuple(overrides),
        warnings=tuple(installed.warnings),
    )
    for observe in installed.observers:
        observe(made)
    return made


def check_names(request: Request, environment: Mapping[str, str], installed: Installed) -> None:
    """Check, without probing anything, that each plugin asked for is installed under that name."""
    for slot in SLOTS:
        ask = _ask(slot, request, environment, installed, [])
        if ask is not None:
            for name in _names(ask.value) if slot == "trackers" else (ask.value,):
                _look_up(_kind(slot), name, ask, installed)


def choose_launcher(
    request: Request, environment: Mapping[str, str], installed: Installed, features: frozenset[str]
) -> Decision:
    """Fill the launcher slot alone, for `torchport launch`.

    Args:
        request: As for `plan`.
        environment: As for `plan`.
        installed: As for `plan`.
        features: What the launcher must be able to do (`LauncherSpec.features`).
    """
    settings = _Settings(request, environment)
    ask = _ask("launcher", request, environment, installed, [])
    if ask is not None:
        decision = _choose_named("launcher", ask, installed, settings)
        lacking = features - getattr(decision.spec, "features", frozenset())
        if lacking:
            able = [s.name for s in installed.specs("launcher") if features <= s.features]
            raise IncompatibleError(
                f"{ask.source} asks for the launcher {decision.name!r}",
                reason=f"it cannot do: {', '.join(sorted(lacking))}",
                hint=f"one of {', '.join(able)}" if able else "",
            )
        return decision
    candidates = [s for s in installed.specs("launcher") if s.priority > 0]
    rejected = [Rejection(s.name, f"cannot do: {', '.join(sorted(features - s.features))}") for s in candidates if features - s.features]
    able = [s for s in candidates if features <= s.features]
    return _highest("launcher", able, rejected, installed, settings, "the simplest that can do what is asked")


def choose_backend(request: Request, environment: Mapping[str, str], installed: Installed) -> Decision:
    """Fill the backend slot alone, for whoever needs its probe only."""
    ask = _ask("backend", request, environment, installed, [])
    return _choose_backend(ask, installed, _Settings(request, environment))


# --- who asks for what ---------------------------------------------------------------------------------------


def _ask(
    slot: str, request: Request, environment: Mapping[str, str], installed: Installed, overrides: list[str]
) -> _Ask | None:
    """Find the source that decides a slot, and note a variable that an argument overrides."""
    variable = slot_variable(slot)
    from_environment = environment.get(variable) or None
    origin = envvars.origins(environment).get(variable)
    environment_source = f"{origin} ({variable})" if origin else variable
    argument = request.arguments.get(slot)
    if argument is not None:
        ask = _Ask(argument, f"{request.asked_by} {slot}={_show(argument)}")
        if from_environment is not None and _differs(slot, argument, from_environment, installed):
            overrides.append(f"{ask.source} overrides {environment_source}={from_environment}")
        return ask
    if from_environment is not None:
        return _Ask(from_environment, environment_source)
    configured = request.configured.get(slot)
    return _Ask(configured, f"{request.config_file}: {slot}") if configured else None


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, (str, list, tuple)) else type(value).__name__ + "(...)"


def _differs(slot: str, argument: Any, variable: str, installed: Installed) -> bool:
    if slot == "trackers":
        return set(_names(argument)) != set(_names(variable))
    spec = next((s for s in installed.specs(_kind(slot)) if variable in (s.name, *s.aliases)), None)
    names = (spec.name, *spec.aliases) if spec is not None else (variable,)
    return argument not in names if isinstance(argument, str) else not (spec and _configures(spec, argument))


def _names(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def _configures(spec: Spec, value: Any) -> bool:
    """Whether `value` is an instance of the spec's configuration dataclass, told by its name alone."""
    return bool(spec.config) and any(
        f"{kind.__module__}:{kind.__qualname__}" == spec.config for kind in type(value).__mro__
    )


class _Settings:
    """Builds a chosen plugin's settings: handler, then variables over file over defaults."""

    def __init__(self, request: Request, environment: Mapping[str, str]) -> None:
        self.request, self.environment = request, environment

    def of(self, spec: Spec, given: Any = None) -> Any:
        if not spec.config:
            return None
        for value in (given, *self.request.handlers):
            if _configures(spec, value):
                return value
        config = load_reference(spec.config)
        section = schema.section_of(config)
        where = f"{self.request.config_file}: {section}"
        values = schema.from_mapping(config, self.request.settings.get(section, {}), where)
        values |= schema.from_environment(config, self.environment)
        try:
            return config(**values)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the settings of {spec.kind} {spec.name!r} are not valid", reason=str(error)
            ) from error


def _look_up(kind: str, value: Any, ask: _Ask, installed: Installed) -> Any:
    """Find the spec that a name, or a configuration object, stands for."""
    if isinstance(value, str):
        return installed.find(kind, value.strip().lower(), ask.source).spec
    for spec in installed.specs(kind):
        if _configures(spec, value):
            return spec
    raise ConfigurationError(
        f"{ask.source}: {type(value).__name__} is neither the name nor the settings of a {kind}",
        found=", ".join(spec.name for spec in installed.specs(kind)) or "none installed",
    )


# --- filling slots -------------------------------------------------------------------------------------------


def _choose_backend(ask: _Ask | None, installed: Installed, settings: _Settings) -> Decision:
    if ask is not None:
        return _choose_named("backend", ask, installed, settings)
    available, rejected = [], []
    for spec in installed.specs("backend"):
        probe = installed.probe(spec)
        if probe.available:
            available.append(spec)
        else:
            rejected.append(Rejection(spec.name, probe.reason))
    rejected += [Rejection(f"plugin {f.plugin.name}", f"could not be registered: {f.reason}") for f in installed.failures]
    rejected += [Rejection(f"plugin {name}", reason) for name, reason in sorted(installed.denied.items())]
    rejected += [
        Rejection(name, f"offered by {' and by '.join(map(str, plugins))}")
        for (kind, name), plugins in sorted(installed.clashes.items())
        if kind == "backend"
    ]
    return _highest("backend", available, rejected, installed, settings, "the highest priority that is available")


def _highest(
    slot: str, candidates: list[Any], rejected: list[Rejection], installed: Installed, settings: _Settings, why: str
) -> Decision:
    """Take the candidate with the highest priority; refuse to guess between equals."""
    if not candidates:
        raise UnavailableError(
            f"no {slot} can be chosen automatically",
            found="; ".join(f"{r.name}: {r.reason}" for r in rejected) or f"no {slot} is installed",
            hint="torchport doctor" if rejected else "pip install torchport (which brings the cpu backend)",
        )
    top = max(spec.priority for spec in candidates)
    best = [spec for spec in candidates if spec.priority == top]
    if len(best) > 1:
        names = " and ".join(repr(spec.name) for spec in best)
        variable = slot_variable(slot)
        raise AmbiguousError(
            f"no {slot} was asked for, and {names} are equally good (priority {top})",
            hint=f"say which: export {variable}={best[0].name}",
        )
    rejected = rejected + [
        Rejection(spec.name, f"lower priority ({spec.priority} < {top})") for spec in candidates if spec is not best[0]
    ]
    return Decision(
        slot=slot, choice=(best[0].name,), source=f"{AUTOMATIC}: {why}", spec=best[0],
        config=settings.of(best[0]), rejected=tuple(rejected),
    )  # fmt: skip


def _choose_named(slot: str, ask: _Ask | None, installed: Installed, settings: _Settings) -> Decision:
    """Take what was asked for, if it is available; leave the slot empty if nothing was."""
    if ask is None:
        return Decision(slot=slot, choice=(), source="not asked for")
    spec = _look_up(slot, ask.value, ask, installed)
    probe = installed.probe(spec)
    if not probe.available:
        raise UnavailableError(
            f"{ask.source} asks for the {slot} {spec.name!r}, which is installed but cannot be used here",
            reason=probe.reason,
            hint=f"unset {slot_variable(slot)} for automatic selection, or see: torchport doctor",
        )
    return Decision(slot=slot, choice=(spec.name,), source=ask.source, spec=spec, config=settings.of(spec, ask.value))


def _needs(decision: Decision) -> Requirements:
    return getattr(decision.spec, "needs", Requirements())


def _lacking(spec: Any, backend: BackendSpec, installed: Installed) -> tuple[str, ...]:
    """Name what `spec` needs and the backend's device cannot do; the backend is asked only if need be."""
    return () if spec.needs.empty else spec.needs.missing(installed.capabilities(backend))


def _check_needs(decision: Decision, backend: BackendSpec, installed: Installed) -> Decision:
    lacking = _lacking(decision.spec, backend, installed)
    if lacking:
        raise IncompatibleError(
            f"{decision.source} asks for the {decision.slot} {decision.name!r} on the backend {backend.name!r}",
            reason=f"the backend has no {' and no '.join(lacking)}",
            hint=f"another {decision.slot} or another backend: torchport plugins",
        )
    return decision


def _choose_strategy(
    ask: _Ask | None, installed: Installed, settings: _Settings, backend: BackendSpec, topology: Topology
) -> Decision:
    processes = topology.world_size
    if ask is not None:
        decision = _choose_named("strategy", ask, installed, settings)
        limit = getattr(decision.spec, "max_processes", 0)
        if limit and processes > limit:
            raise IncompatibleError(
                f"{ask.source} asks for the strategy {decision.name!r} in a job of {processes} processes",
                reason=f"it runs on at most {limit}: every process would train a model of its own",
                hint=f"leave the choice to Torchport (unset {slot_variable('strategy')}), or start {limit} process",
            )
        return _check_needs(decision, backend, installed)
    fitting, rejected = [], []
    for spec in installed.specs("strategy"):
        if spec.priority <= 0:
            rejected.append(Rejection(spec.name, "taken only when asked for"))
        elif processes < spec.min_processes or (spec.max_processes and processes > spec.max_processes):
            rejected.append(Rejection(spec.name, f"not for {processes} process{'es' * (processes != 1)}"))
        elif lacking := _lacking(spec, backend, installed):
            rejected.append(Rejection(spec.name, f"backend {backend.name!r} has no {' and no '.join(lacking)}"))
        else:
            fitting.append(spec)
    count = f"{processes} process{'es' * (processes != 1)}"
    return _highest("strategy", fitting, rejected, installed, settings, f"fits {count}")


def _choose_precision(
    ask: _Ask | None, installed: Installed, settings: _Settings, backend: BackendSpec
) -> Decision:
    if ask is not None:
        return _check_needs(_choose_named("precision", ask, installed, settings), backend, installed)
    default = next((s for s in installed.specs("precision") if s.default), None)
    if default is None:
        raise UnavailableError("no installed precision is the default", hint="pip install --force-reinstall torchport-core")
    rejected = tuple(
        Rejection(s.name, "taken only when asked for") for s in installed.specs("precision") if s is not default
    )
    return Decision(
        slot="precision", choice=(default.name,), source=f"{AUTOMATIC}: the default", spec=default,
        config=settings.of(default), rejected=rejected,
    )  # fmt: skip


def _choose_collectives(
    ask: _Ask | None, installed: Installed, settings: _Settings, backend: BackendSpec, distributed: bool
) -> Decision:
    if not distributed:
        note = f"; {ask.source}={ask.value} is not needed" if ask is not None else ""
        return Decision(slot="collectives", choice=(), source=f"not needed by one process{note}")
    if ask is None:
        if not backend.collectives:
            raise IncompatibleError(
                f"a job of several processes on the backend {backend.name!r}",
                reason="the backend names no collectives",
                hint=f"start one process, or name some: {slot_variable('collectives')}=...",
            )
        ask = _Ask(backend.collectives, f"{AUTOMATIC}: the default of backend {backend.name!r}")
    decision = _choose_named("collectives", ask, installed, settings)
    types = getattr(decision.spec, "device_types", ())
    if types and backend.device_type not in types:
        raise IncompatibleError(
            f"{ask.source} asks for the collectives {decision.name!r} on the backend {backend.name!r}",
            reason=f"they carry tensors of {', '.join(types)}, not of {backend.device_type}",
            hint=f"{slot_variable('collectives')}={backend.collectives}" if backend.collectives else "",
        )
    others = tuple(
        Rejection(s.name, "not the backend's default" if AUTOMATIC in decision.source else "another was asked for")
        for s in installed.specs("collectives")
        if s is not decision.spec
    )
    return Decision(
        slot="collectives", choice=decision.choice, source=decision.source, spec=decision.spec,
        config=decision.config, rejected=others,
    )  # fmt: skip


def _choose_trackers(ask: _Ask | None, installed: Installed) -> Decision:
    if ask is None:
        return Decision(slot="trackers", choice=(), source="not asked for")
    specs = [_look_up("tracker", name, ask, installed) for name in _names(ask.value)]
    for spec in specs:
        probe = installed.probe(spec)
        if not probe.available:
            raise UnavailableError(f"{ask.source} asks for the tracker {spec.name!r}", reason=probe.reason)
    return Decision(
        slot="trackers", choice=tuple(spec.name for spec in specs), source=ask.source, spec=specs[0] if specs else None
    )
