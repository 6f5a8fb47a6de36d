"""What every part of a script can ask about the run: shared state, made anew only when it is reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torchport.aliases import STATE_ATTRIBUTES, STATE_SELECTORS
from torchport.config.kwargs import GradientAccumulationPlugin
from torchport.distributed_type import DistributedType
from torchport.errors import ConfigurationError, TorchportError
from torchport.plan.selection import Plan, Request
from torchport.plugin.specs import Topology
from torchport.process_control import ProcessControl
from torchport.runtime import Runtime


def is_initialized() -> bool:
    """Whether a run is open: a state or an accelerator has been made, and has not been reset."""
    return Runtime.current is not None


class PartialState(ProcessControl):
    """The device and the processes of the run, for code that needs nothing else.

    All instances share one state, which the first one creates: it resolves a plan, opens the device and, with
    several processes, the process group.

    Args:
        cpu: Whether to work on the host's processor; the same as `backend="cpu"`.
        **kwargs: The slots `backend` and `collectives`, and a `timeout` (`datetime.timedelta`).

    Raises:
        TorchportError: if the plan cannot be resolved or opened.
    """

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        if Runtime.current is None or cpu or kwargs:
            Runtime.open(_partial_request(cpu, kwargs), commits=("backend", "collectives"))

    @property
    def runtime(self) -> Runtime:
        """The objects of the run."""
        if Runtime.current is None:
            raise TorchportError(
                "this state belongs to a run that has ended",
                hint="make a new PartialState() or Accelerator()",
            )
        return Runtime.current

    @property
    def initialized(self) -> bool:
        """Whether a run is open."""
        return Runtime.current is not None

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.runtime.plan

    @property
    def topology(self) -> Topology:
        """The place of this process in the job."""
        return self.runtime.topology

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.runtime.device

    @property
    def default_device(self) -> torch.device:
        """The device that automatic selection gives this process."""
        return self.runtime.device

    @property
    def backend(self) -> str | None:
        """Name of the collectives, or `None` with one process."""
        return self.plan.collectives if self.runtime.collectives is not None else None

    @property
    def distributed_type(self) -> DistributedType:
        """The kind of distributed training."""
        return DistributedType(self.plan.distributed_type)

    @property
    def debug(self) -> bool:
        """Whether shapes are compared across processes before every operation."""
        return self.runtime.debug

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group and end the run.

        Args:
            group: A group that the script has made with `torch.distributed.new_group`: leave that one only.
        """
        if group is None:
            self.runtime.close()
        else:
            dist.destroy_process_group(group)

    def set_device(self) -> None:
        """Make the device of this process the current one again, where a script has changed it."""
        self.runtime.backend.device(self.topology.local_rank)

    @staticmethod
    def _reset_state() -> None:
        """End the run, so that the next state or accelerator starts anew."""
        if Runtime.current is not None:
            Runtime.current.close()
        GradientState._shared.clear()

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type.value}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )


def _partial_request(cpu: bool, kwargs: dict[str, Any]) -> Request:
    from torchport.aliases import resolve_keywords
    from torchport.config.kwargs import InitProcessGroupKwargs

    arguments = {
        slot: kwargs.pop(slot) for slot in ("backend", "collectives") if kwargs.get(slot) is not None
    }
    timeout = kwargs.pop("timeout", None)
    kwargs.pop("_from_accelerator", None)
    if kwargs:
        raise TypeError(f"PartialState takes no argument {next(iter(kwargs))!r}")
    handlers = (InitProcessGroupKwargs(timeout=timeout),) if timeout is not None else ()
    if cpu:
        arguments = resolve_keywords({"cpu": True}, arguments)
    return Request(arguments=arguments, asked_by="PartialState", handlers=handlers, lays_out=False)


class AcceleratorState(PartialState):
    """What `PartialState` knows, and the precision; shared like it, and made by `Accelerator`.

    Args:
        mixed_precision: Name of the precision; must agree with what the accelerator was made with.
        cpu: As for `PartialState`.
        **kwargs: As for `PartialState`.
    """

    def __init__(self, mixed_precision: str | None = None, cpu: bool = False, **kwargs: Any) -> None:
        if mixed_precision is not None:
            request = Request(
                arguments={"precision": mixed_precision}, asked_by="AcceleratorState", lays_out=False
            )
            Runtime.open(request, commits=("backend", "collectives", "precision"))
        super().__init__(cpu=cpu, **kwargs)

    @property
    def mixed_precision(self) -> str:
        """Name of the precision."""
        return self.plan.precision

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.plan.strategy

    @property
    def strategy_settings(self) -> Any:
        """The settings of the strategy; of several by name, the selected one."""
        settings = self.plan["strategy"].config
        if not isinstance(settings, Mapping):
            return settings
        return next((one for one in settings.values() if one.selected), None)

    def select_strategy_settings(self, name: str) -> None:
        """Select one of several settings of the strategy, for the models that are prepared next.

        Args:
            name: Its key in the mapping that the accelerator was given.

        Raises:
            ConfigurationError: if there is none of that name.
        """
        settings = self.plan["strategy"].config
        known = settings if isinstance(settings, Mapping) else {}
        if name not in known:
            raise ConfigurationError(
                f"the strategy {self.strategy!r} has no settings called {name!r}",
                found=", ".join(map(repr, known)) or "one alone, without a name",
                hint="Accelerator(strategy={'a name': settings, ...})",
            )
        for key, one in known.items():
            one.selected = key == name

    def __getattr__(self, name: str) -> Any:
        """Return documented attributes that belong to a strategy: its settings, `None` under another one."""
        if name in STATE_SELECTORS:
            return self.select_strategy_settings
        if name in STATE_ATTRIBUTES:
            return self.strategy_settings if self.strategy == STATE_ATTRIBUTES[name] else None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """End the run, so that the next accelerator can be made with another configuration."""
        PartialState._reset_state()

    def __repr__(self) -> str:
        return super().__repr__() + f"\nMixed precision type: {self.mixed_precision}\n"


class GradientState:
    """Whether gradients are exchanged and applied at this micro-batch. All instances share one state.

    Attributes:
        sync_gradients: Whether the current micro-batch ends its accumulation window.
        inside_window: Whether the script is inside `accumulate()`, which decides that.
        active_dataloader: The prepared loader that gave a batch last, of those being iterated.
        dataloader_references: The loaders being iterated, outermost first; `None` stands for none.
        plugin_kwargs: The settings of gradient accumulation that differ from their defaults.
        lend: Inside `join_uneven_inputs`, what goes on with a loader where others have batches left.
        weightless: Whether the current batch was lent and counts nothing.
        may_leave: Inside `join_uneven_inputs`, whether processes without batches leave the loop instead.
    """

    _shared: dict[str, Any] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = GradientState._shared
        if not self.initialized:
            self.sync_gradients = True
            self.inside_window = False
            self.active_dataloader: Any = None
            self.dataloader_references: list[Any] = [None]
            self.lend: Callable[[Any, Iterator[Any]], Iterator[Any]] | None = None
            self.weightless = False
            self.may_leave = False
            self.plugin = gradient_accumulation_plugin or GradientAccumulationPlugin()
        elif gradient_accumulation_plugin is not None:
            self.plugin = gradient_accumulation_plugin

    def __reduce__(self) -> tuple[Any, ...]:
        return (GradientState, ())  # copies share the one state too

    @property
    def initialized(self) -> bool:
        """Whether the shared state exists."""
        return bool(GradientState._shared)

    @property
    def plugin_kwargs(self) -> dict[str, Any]:
        """The settings of gradient accumulation that differ from their defaults."""
        return self.plugin.to_kwargs()

    @property
    def num_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.plugin.num_steps or 1

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers count the micro-batches that take no step."""
        return self.plugin.adjust_scheduler

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the end of a loader ends the window."""
        return self.plugin.sync_with_dataloader

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the current batch is the last of the loader being iterated."""
        return self.active_dataloader is not None and bool(self.active_dataloader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """Number of samples in the last round of batches that are not repeated ones; -1 where all are real."""
        return -1 if self.active_dataloader is None else int(self.active_dataloader.remainder)

    @property
    def real_samples(self) -> int | tuple[int, ...]:
        """Number of samples of the current round that are not repeated ones: `remainder`, or one for each process."""
        return getattr(self.active_dataloader, "real_samples", None) or self.remainder

    def _add_dataloader(self, loader: Any) -> None:
        self.active_dataloader = loader
        self.dataloader_references.append(loader)

    def _remove_dataloader(self, loader: Any) -> None:
        if not self.initialized:  # the run ended while the loader was being iterated
            return
        if loader in self.dataloader_references:
            self.dataloader_references.remove(loader)
        self.active_dataloader = self.dataloader_references[-1] if self.dataloader_references else None

    @staticmethod
    def started() -> bool:
        """Whether the shared state exists already."""
        return bool(GradientState._shared)

    @staticmethod
    @contextmanager
    def _changing() -> Iterator[None]:
        """Give out a block that changes the state; if it fails, the state is as before."""
        before = dict(GradientState._shared)
        try:
            yield
        except BaseException:
            GradientState._shared.clear()
            GradientState._shared.update(before)
            raise

    @staticmethod
    def _reset_state() -> None:
        """Forget everything."""
        GradientState._shared.clear()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )
