"""Keyword arguments for PyTorch objects that Torchport builds, as dataclasses that import no torch."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

from torchport.errors import ConfigurationError


class KwargsHandler:
    """Base of the dataclasses that `Accelerator(kwargs_handlers=[...])` takes."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_kwargs(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by name."""
        defaults = type(self)().__dict__
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


@dataclasses.dataclass
class AutocastKwargs(KwargsHandler):
    """How mixed-precision regions behave (`torch.autocast`).

    Attributes:
        enabled: Whether operations are cast at all.
        cache_enabled: Whether weights cast once are kept for the region; `None` leaves it to PyTorch.
    """

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclasses.dataclass
class GradScalerKwargs(KwargsHandler):
    """How the loss is scaled when training in float16 (`torch.amp.GradScaler`).

    Attributes:
        init_scale: First scale.
        growth_factor: Factor applied to the scale after `growth_interval` steps without overflow.
        backoff_factor: Factor applied to the scale after a step with overflow.
        growth_interval: Steps without overflow between two growths.
        enabled: Whether the loss is scaled at all.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclasses.dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How the process group is opened.

    Attributes:
        backend: Name of the collectives; the same as `Accelerator(collectives=...)`.
        init_method: Only `"env://"` (or `None`) is accepted: the launcher says where processes meet.
        timeout: How long an operation waits for other processes, as a `timedelta` or in seconds; `None` takes
            `TORCHPORT_TIMEOUT` or 30 minutes.

    Raises:
        ConfigurationError: if the timeout is not a positive, finite time.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | float | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            self.timeout = read_timeout(self.timeout, "InitProcessGroupKwargs(timeout=...)")


@dataclasses.dataclass
class ProfileKwargs(KwargsHandler):
    """How `Accelerator.profile` records (`torch.profiler.profile`).

    Attributes:
        activities: Names of what to record (`"cpu"`, or a device's); `None` takes all that are supported.
        schedule_option: Arguments of `torch.profiler.schedule` (`wait`, `warmup`, `active`, `repeat`, `skip_first`).
        on_trace_ready: Called with the profiler whenever a cycle is complete.
        record_shapes: Whether to record the shapes of inputs.
        profile_memory: Whether to record allocations.
        with_stack: Whether to record source lines.
        with_flops: Whether to estimate operations.
        with_modules: Whether to record the module hierarchy.
        output_trace_dir: Folder for one Chrome trace per rank.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None


@dataclasses.dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How gradients are accumulated over micro-batches.

    Attributes:
        num_steps: Micro-batches per optimizer step; `None` takes the accelerator's argument.
        adjust_scheduler: Whether schedulers count the micro-batches that take no step.
        sync_with_dataloader: Whether the end of a loader ends the window.
        sync_each_batch: Whether gradients are exchanged after every micro-batch: less memory under some
            strategies, more communication.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            self.num_steps = read_steps(self.num_steps, "GradientAccumulationPlugin(num_steps=...)")


@dataclasses.dataclass
class DataLoaderConfiguration:
    """How loaders are shared out over processes.

    Attributes:
        split_batches: Whether the loader's batch size is that of all processes together.
        dispatch_batches: Whether the main process reads all batches and sends the others theirs; `None`: for
            iterable data sets that do not divide themselves.
        even_batches: Whether samples from the beginning fill up the last batches, so that all processes have
            the same number of batches of the same size.
        use_seedable_sampler: Whether shuffling depends on seed and epoch alone.
        data_seed: That seed; `None` takes PyTorch's.
        non_blocking: Whether copies to the device are asynchronous (needs pinned memory).
        use_stateful_dataloader: Whether loaders are built on torchdata's `StatefulDataLoader`.
        prefetch_to_device: Whether the next batch is copied to the device while the current one is computed on,
            on devices with streams or a way of their own; it takes the memory of one more batch.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False
    prefetch_to_device: bool = True


@dataclasses.dataclass
class ProjectConfiguration:
    """Where a project keeps its files.

    Attributes:
        project_dir: Folder of the project.
        logging_dir: Folder for trackers; `None` takes `project_dir`.
        automatic_checkpoint_naming: Whether `save_state` numbers checkpoints under `project_dir/checkpoints`.
        total_limit: Most checkpoints to keep; the oldest go first. `None` keeps all.
        iteration: Number of the next checkpoint.
        save_on_each_node: Whether the main process of every machine writes, for disks that are not shared.
    """

    project_dir: str | None = None
    logging_dir: str | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        if self.logging_dir is None:
            self.logging_dir = self.project_dir

    def set_directories(self, project_dir: str | None = None) -> None:
        """Set `project_dir`, and `logging_dir` where it has none."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


def read_timeout(value: Any, where: str) -> timedelta:
    """Return a timeout that was given as a `timedelta`, a number of seconds or a text with one.

    Raises:
        ConfigurationError: naming `where` it was given, if it is not a positive, finite time.
    """
    seconds: Any = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, bool):
        try:
            seconds = float(seconds)
        except (TypeError, ValueError):
            seconds = math.nan
        if 0 < seconds <= timedelta(days=36500).total_seconds():
            return timedelta(seconds=seconds)
    raise ConfigurationError(
        f"{where} must be a time that operations wait for other processes",
        found=repr(value),
        reason="it is finite and longer than zero",
        hint="seconds, such as 1800, or datetime.timedelta(minutes=30)",
    )


def read_steps(value: Any, where: str) -> int:
    """Return a number of micro-batches.

    Raises:
        ConfigurationError: naming `where` it was given, if it is not a whole number of at least 1.
    """
    try:
        steps = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ConfigurationError(
            f"{where} must be a whole number of at least 1",
            found=repr(value),
            hint="1 for an optimizer step with every batch",
        )
    return steps


def listed(handlers: Iterable[Any] | None) -> tuple[Any, ...]:
    """Return what `kwargs_handlers` was given.

    Raises:
        ConfigurationError: if it is a dictionary of keyword arguments.
    """
    if isinstance(handlers, (str, Mapping)):
        raise ConfigurationError(
            f"kwargs_handlers takes a list of settings, not a {type(handlers).__name__}",
            hint="kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]",
        )
    return tuple(handlers or ())


def first_of(handlers: Iterable[Any], kind: type) -> Any:
    """Return the first handler of a kind, or one with the defaults."""
    return next((handler for handler in handlers if isinstance(handler, kind)), None) or kind()


__all__ = [
    "AutocastKwargs",
    "DataLoaderConfiguration",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "ProfileKwargs",
    "ProjectConfiguration",
    "first_of",
    "listed",
]
