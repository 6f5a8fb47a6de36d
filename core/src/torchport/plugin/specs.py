"""The frozen descriptors that hooks return.

A descriptor says what a plugin offers and names the factory that builds it. Creating one imports neither
torch nor a vendor package: the factory is imported when it has been chosen, the probe when the choice is being
made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torchport.errors import InvalidSpecError
from torchport.plugin.requirements import plain_name

HOOK_API = 1
"""Number of the seam. A core accepts descriptors of this number and of the one before."""

_NAME = re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class Record:
    """Compares, hashes and shows a descriptor field by field.

    `dataclass` would compile functions for that anew for each class, and a launch would take a twentieth longer.
    """

    __slots__ = ()

    def _values(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values().values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__qualname__}({shown})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Probe(Record):
    """What looking for a device (or a communication library) found.

    Attributes:
        available: Whether it can be used now, in this process.
        count: How many devices this machine has; the default number of processes of a launch.
        reason: Why it is not available, and what to do about it. Empty when it is.
        details: Facts worth showing to an operator (driver version, device names).
    """

    available: bool
    count: int = 0
    reason: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Capabilities(Record):
    """What a backend's device can do. What is declared here must pass the conformance kit.

    Attributes:
        autocast: Names of the dtypes that `torch.autocast` accepts on the device (`"bfloat16"`, `"float16"`).
        grad_scaler: Whether `torch.amp.GradScaler` works on the device.
        distributed: Whether several processes can train together on such devices.
        host_memory: Whether tensors of the device live in ordinary host memory, so that batches need no copy.
        pinned_memory: Whether pinned host memory makes copies to the device asynchronous.
        streams: Whether work can be queued on several streams.
        memory_stats: Whether the device reports its memory use.
        compile: Whether `torch.compile` has a backend for the device.
        features: Further capabilities by name, for strategies and precisions that need them (`"fp8"`).
    """

    autocast: frozenset[str] = frozenset()
    grad_scaler: bool = False
    distributed: bool = True
    host_memory: bool = False
    pinned_memory: bool = False
    streams: bool = False
    memory_stats: bool = False
    compile: bool = False
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Requirements(Record):
    """What a strategy, precision or quantizer needs of the backend's device.

    Attributes:
        autocast: Names of dtypes that `torch.autocast` must accept.
        grad_scaler: Whether loss scaling must work.
        distributed: Whether a process group must be open, even for one process.
        features: Names that must be among `Capabilities.features`.
    """

    autocast: frozenset[str] = frozenset()
    grad_scaler: bool = False
    distributed: bool = False
    features: frozenset[str] = frozenset()

    @property
    def empty(self) -> bool:
        """Whether nothing at all is needed."""
        return not (self.autocast or self.grad_scaler or self.distributed or self.features)

    def missing(self, capabilities: Capabilities) -> tuple[str, ...]:
        """Name what `capabilities` lacks, in words that fit after "the backend has no"."""
        lacking = [f"autocast to {dtype}" for dtype in sorted(self.autocast - capabilities.autocast)]
        if self.grad_scaler and not capabilities.grad_scaler:
            lacking.append("gradient scaler")
        if self.distributed and not capabilities.distributed:
            lacking.append("process groups")
        lacking += sorted(self.features - capabilities.features)
        return tuple(lacking)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Spec(Record):
    """Fields common to all kinds of plugin.

    Attributes:
        name: What users type: lower-case letters, digits, `-` and `_`.
        factory: `"module:Class"` to import when this plugin has been chosen.
        summary: One line for `torchport plugins`.
        aliases: Other accepted spellings of the name.
        runtime: PEP 508 requirements of the vendor's runtime, checked from installed metadata before the
            probe or the factory is imported.
        config: `"module:Dataclass"` with the plugin's settings, from which their flags, YAML keys and
            variables are derived.
        api: The `HOOK_API` that the plugin was written for.
    """

    kind: ClassVar[str] = ""

    name: str
    factory: str
    summary: str = ""
    aliases: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    config: str = ""
    api: int = HOOK_API

    def __post_init__(self) -> None:
        where = f"{type(self).__name__}(name={self.name!r})"
        for label in (self.name, *self._tuple("aliases")):
            if not isinstance(label, str) or not _NAME.fullmatch(label):
                raise InvalidSpecError(
                    f"{where}: {label!r} is not a plugin name",
                    reason="names are lower-case letters and digits, joined by single '-' or '_'",
                )
        self._check_reference("factory", required=True)
        self._check_reference("config", required=False)
        for requirement in self._tuple("runtime"):
            _check_requirement(where, requirement)
        if self.api not in (HOOK_API, HOOK_API - 1):
            raise InvalidSpecError(
                f"{where} was written for hook API {self.api}",
                found=f"this core speaks {HOOK_API - 1} and {HOOK_API}",
                hint="pip install --upgrade torchport-core, or a release of the plugin for this core",
            )

    def _tuple(self, attribute: str) -> tuple[Any, ...]:
        value = getattr(self, attribute)
        if not isinstance(value, tuple):
            raise InvalidSpecError(
                f"{type(self).__name__}(name={self.name!r}): {attribute} must be a tuple",
                found=repr(value),
                hint=f"{attribute}=({value!r},)" if isinstance(value, str) else f"{attribute}=tuple(...)",
            )
        return value

    def _check_reference(self, attribute: str, *, required: bool) -> None:
        value = getattr(self, attribute)
        if (value or required) and not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
            raise InvalidSpecError(
                f"{type(self).__name__}(name={self.name!r}): {attribute} must be of the form 'module:Name'",
                found=repr(value),
            )


def _check_requirement(where: str, requirement: str) -> None:
    if isinstance(requirement, str) and plain_name(requirement):
        return
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        Requirement(requirement)
    except InvalidRequirement as error:
        raise InvalidSpecError(
            f"{where}: {requirement!r} is not a requirement",
            reason=str(error),
            hint='write it as "name>=1.0"',
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class BackendSpec(Spec):
    """A kind of device and how to talk to it.

    Attributes:
        device_type: The type of the `torch.device` it gives out (`"cpu"`, or what the vendor registered).
        probe: `"module:function"` returning a `Probe`. It must not initialise the runtime: processes may
            fork.
        priority: Automatic selection takes the highest that is available; the host's own processor has 0.
        collectives: Name of the collectives that several processes use unless told otherwise.
        visible_devices_env: Variable by which the vendor's runtime restricts the devices a process sees.
        distributed_type: Label of `DistributedType` for data-parallel training on several such devices.
        single_process: Why a job on such devices has one process only; empty where it may have several.
    """

    kind: ClassVar[str] = "backend"

    device_type: str
    probe: str
    priority: int = 100
    collectives: str = ""
    visible_devices_env: str = ""
    distributed_type: str = ""
    single_process: str = ""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        self._check_reference("probe", required=True)
        if not self.device_type or not isinstance(self.device_type, str):
            raise InvalidSpecError(
                f"BackendSpec(name={self.name!r}): device_type must be a torch device type"
            )
        _check_integer(self, "priority")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class CollectivesSpec(Spec):
    """A way for processes to exchange tensors.

    Attributes:
        device_types: Device types whose tensors it carries. Empty means any.
        probe: `"module:function"` returning a `Probe`; empty means always available.
    """

    kind: ClassVar[str] = "collectives"

    device_types: tuple[str, ...] = ()
    probe: str = ""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        self._tuple("device_types")
        self._check_reference("probe", required=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class PrecisionSpec(Spec):
    """A number format to work in.

    Attributes:
        needs: What the backend's device must be able to do.
        default: Whether automatic selection takes it; exactly one installed precision says so.
    """

    kind: ClassVar[str] = "precision"

    needs: Requirements = Requirements()
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class StrategySpec(Spec):
    """A layout of model, optimizer and gradients over processes.

    Attributes:
        needs: What the backend's device must be able to do.
        distributed_type: Label of `DistributedType`; empty takes the backend's own label.
        priority: Automatic selection takes the highest that fits the number of processes;
            0 or less is never taken automatically.
        min_processes: Fewest processes for which it is taken automatically.
        max_processes: Most processes it can run on; 0 means any number.
        parallelism: Dimensions of a `ParallelismConfig` that it can lay out; any other is refused before the start.
            Its settings may have a method `parallelism_problem(config)`, which returns why they do not go with it.
        start_process: `"module:function"` that sets up a process for it, given its `Topology`: after the backend has
            set it up, and before the device is opened. Empty where there is nothing to set up.
    """

    kind: ClassVar[str] = "strategy"

    needs: Requirements = Requirements()
    distributed_type: str = ""
    priority: int = 0
    min_processes: int = 1
    max_processes: int = 0
    parallelism: tuple[str, ...] = ()
    start_process: str = ""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        self._check_reference("start_process", required=False)
        for attribute in ("priority", "min_processes", "max_processes"):
            _check_integer(self, attribute)
        self._tuple("parallelism")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class LauncherSpec(Spec):
    """A way to bring processes to life.

    Attributes:
        priority: Automatic selection takes the highest whose features suffice; 0 or less is never automatic.
        features: What it can do beyond starting processes on this machine: `"machines"`, `"restarts"`,
            `"rendezvous"`.
        probe: `"module:function"` returning a `Probe`; empty means always available.
    """

    kind: ClassVar[str] = "launcher"

    priority: int = 0
    features: frozenset[str] = frozenset()
    probe: str = ""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        self._check_reference("probe", required=False)
        _check_integer(self, "priority")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TrackerSpec(Spec):
    """A place where metrics go.

    Attributes:
        requires_logging_directory: Whether it writes files, and must be given a folder for them.
        main_process_only: Whether it is built on the main process only.
    """

    kind: ClassVar[str] = "tracker"

    requires_logging_directory: bool = False
    main_process_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class QuantizerSpec(Spec):
    """A way to store weights in fewer bits.

    Attributes:
        needs: What the backend's device must be able to do.
    """

    kind: ClassVar[str] = "quantizer"

    needs: Requirements = Requirements()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class CommandSpec(Spec):
    """A sub-command of `torchport`; its factory names a `click.Command`, imported when it is called."""

    kind: ClassVar[str] = "command"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Finding(Record):
    """Something that `torchport doctor` should tell the operator.

    Attributes:
        level: `"info"`, `"warning"` or `"error"`.
        subject: What it is about, in a word or two.
        message: What was found.
        remedy: What to type about it.
    """

    level: str
    subject: str
    message: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level not in ("info", "warning", "error"):
            raise InvalidSpecError(f"Finding.level must be 'info', 'warning' or 'error', not {self.level!r}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Topology(Record):
    """Where this process stands among the processes of its job.

    Attributes:
        rank: Index among all processes, from 0.
        world_size: Number of all processes.
        local_rank: Index among the processes of this machine.
        local_world_size: Number of processes on this machine.
        node_rank: Index of this machine.
        num_nodes: Number of machines.
        master_addr: Host name or address of the machine of rank 0; empty if the launcher left none.
        master_port: TCP port on it where the processes meet; 0 if the launcher left none.
        source: Which launcher's variables told so.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str = ""
    master_port: int = 0
    source: str = "no launcher"

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise InvalidSpecError(
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of"
                f" {self.local_world_size} is not a place in a job",
                found=f"read from the variables of: {self.source}",
            )


def _check_integer(spec: Spec, attribute: str) -> None:
    value = getattr(spec, attribute)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidSpecError(
            f"{type(spec).__name__}(name={spec.name!r}): {attribute} must be an integer", found=repr(value)
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Kind(Record):
    """One of the kinds of plugin: its hook, its descriptor and the variable that selects among them.

    Attributes:
        name: Name of the kind.
        hook: Name of the hook that offers plugins of this kind.
        spec: Class of its descriptors.
        variable: Environment variable that fills the slot; empty where there is no slot.
        plural: The name for several.
    """

    name: str
    hook: str
    spec: type[Spec]
    variable: str = ""
    plural: str = ""


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("backend", "torchport_backends", BackendSpec, "TORCHPORT_BACKEND", "backends"),
        Kind("collectives", "torchport_collectives", CollectivesSpec, "TORCHPORT_COLLECTIVES", "collectives"),
        Kind("precision", "torchport_precisions", PrecisionSpec, "TORCHPORT_PRECISION", "precisions"),
        Kind("strategy", "torchport_strategies", StrategySpec, "TORCHPORT_STRATEGY", "strategies"),
        Kind("launcher", "torchport_launchers", LauncherSpec, "TORCHPORT_LAUNCHER", "launchers"),
        Kind("tracker", "torchport_trackers", TrackerSpec, "TORCHPORT_TRACKERS", "trackers"),
        Kind("quantizer", "torchport_quantizers", QuantizerSpec, "TORCHPORT_QUANTIZER", "quantizers"),
        Kind("command", "torchport_commands", CommandSpec, "", "commands"),
    )
}
"""The seven kinds of plugin that fill slots of a plan, and the commands, by name."""
