"""The interface to a kind of device."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from torchport.errors import LaunchError, UnsupportedOperationError
from torchport.plugin.specs import BackendSpec, Capabilities, Topology

if TYPE_CHECKING:
    from torchport.plugin.strategy import PrepareRequest


class Backend(ABC):
    """A kind of device: two methods to write, defaults for the rest.

    The defaults go through `torch.get_device_module(device_type)`, the module that a vendor registers with
    PyTorch, and through `torch.autocast` and `torch.amp`. Override what the device does differently.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    def __init__(self, spec: BackendSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    # --- to be written -----------------------------------------------------------------------------------

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """Return the device that the process of this local rank works on, and make it the current one."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Declare what the device can do."""

    # --- devices -----------------------------------------------------------------------------------------

    @property
    def module(self) -> ModuleType:
        """The vendor's device module, as registered with PyTorch (`torch.<device_type>`)."""
        module: ModuleType = torch.get_device_module(self.spec.device_type)
        return module

    def count(self) -> int:
        """Return the number of devices that this process can see."""
        return int(self.module.device_count())

    def device_index(self, local_rank: int) -> int:
        """Return the index of the device that belongs to the process of this local rank.

        Where a process sees one device only, as under launchers that give each process its own, that is index 0.

        Raises:
            LaunchError: if there are more processes than the devices that this process can see.
        """
        count, variable = self.count(), self.spec.visible_devices_env
        if local_rank < count or count == 1:
            return local_rank if local_rank < count else 0
        shown = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise LaunchError(
            f"the process of local rank {local_rank} has no device of its own",
            found=f"{count} visible device{'s' * (count != 1)} of the backend {self.spec.name!r}{shown}",
            hint=f"start {max(count, 1)} process{'es' * (count > 1)} on this machine"
            + (f", or let {variable} show more" if variable else ""),
        )

    def synchronize(self, device: torch.device) -> None:
        """Wait until all work queued on `device` is done."""
        self.module.synchronize(device)

    # --- memory (bytes) ----------------------------------------------------------------------------------

    def memory_info(self, device: torch.device) -> tuple[int, int]:
        """Return the free and total memory of `device`, in bytes."""
        free, total = self._memory("mem_get_info")(device)
        return int(free), int(total)

    def memory_allocated(self, device: torch.device) -> int:
        """Return the bytes that tensors of this process occupy on `device` now."""
        return int(self._memory("memory_allocated")(device))

    def max_memory_allocated(self, device: torch.device) -> int:
        """Return the most bytes that tensors of this process have occupied since the last reset."""
        return int(self._memory("max_memory_allocated")(device))

    def reset_peak_memory(self, device: torch.device) -> None:
        """Start measuring `max_memory_allocated` anew."""
        self._memory("reset_peak_memory_stats")(device)

    def empty_cache(self) -> None:
        """Return cached, unused memory to the device."""
        release = self._function("empty_cache")
        if release is not None:
            release()

    def _memory(self, function: str) -> Any:
        found = self._function(function)
        if found is None:
            raise UnsupportedOperationError(
                f"backend {self.spec.name!r} has no such figure of its memory",
                reason=f"torch.{self.spec.device_type} has no {function}",
            )
        return found

    def _function(self, name: str) -> Any:
        """Return a function of the vendor's module, else PyTorch's own for its accelerator; `None` if there is none."""
        try:
            found = getattr(self.module, name, None)
        except RuntimeError:  # the runtime has registered no module for its device type
            found = None
        accelerator = torch.accelerator.current_accelerator()
        if found is None and accelerator is not None and accelerator.type == self.spec.device_type:
            found = getattr(torch.accelerator, name, None)
        return found

    # --- random numbers ----------------------------------------------------------------------------------

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the device's default generator: a one-dimensional uint8 tensor on the host."""
        state: torch.Tensor = self.module.get_rng_state(device)
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore what `rng_state` returned."""
        self.module.set_rng_state(state, device)

    def seed(self, seed: int) -> None:
        """Seed the default generators of all devices of this kind."""
        self.module.manual_seed_all(seed)

    # --- streams and copies ------------------------------------------------------------------------------

    def stream(self, device: torch.device) -> Any:
        """Return a new stream for copies beside computation, or `None` where the device has no streams."""
        return self.module.Stream(device) if self.capabilities().streams else None

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue the work of a `with` block on `stream`."""
        context: AbstractContextManager[Any] = nullcontext() if stream is None else self.module.stream(stream)
        return context

    def join_stream(self, stream: Any, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        """Make the work that is queued from now on wait for `stream`, and use tensors that were made there.

        Args:
            stream: What `stream` returned.
            tensors: The tensors; their memory is not used again before that work is done.
            device: Their device.
        """
        if stream is not None:
            current = self.module.current_stream(device)
            current.wait_stream(stream)
            for tensor in tensors:
                tensor.record_stream(current)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` in page-locked host memory where that makes its copy to the device asynchronous."""
        return tensor.pin_memory() if self.capabilities().pinned_memory else tensor

    # --- number formats ----------------------------------------------------------------------------------

    def autocast(self, dtype: torch.dtype, **options: Any) -> AbstractContextManager[Any]:
        """Return a context in which operations run in `dtype` where that is safe (`torch.autocast`)."""
        return torch.autocast(device_type=self.spec.device_type, dtype=dtype, **options)

    def grad_scaler(self, **options: Any) -> torch.amp.GradScaler:
        """Return a loss scaler for training in float16 (`torch.amp.GradScaler`)."""
        return torch.amp.GradScaler(self.spec.device_type, **options)

    def compile_backend(self) -> str:
        """Return the name of the `torch.compile` backend to use unless told otherwise."""
        return "inductor"

    # --- life cycle --------------------------------------------------------------------------------------

    def wrap_dataloader(self, loader: Iterable[Any], device: torch.device) -> Iterable[Any]:
        """Return the loader to iterate over, where the vendor's runtime brings one of its own."""
        return loader

    def read_ahead(self, device: torch.device) -> Callable[[Iterator[Any]], Iterator[Any]] | None:
        """Return what reads batches and moves them to `device` ahead of the step, where the runtime has its own way.

        It is given the batches of a pass on the host and yields them, in order, on the device. `None` leaves that to
        the loader, which copies the next batch on a stream of its own where the device has streams.
        """
        return None

    def adapt(self, request: PrepareRequest) -> None:
        """Change models and optimizers in place before the strategy gets them, where the vendor's library does so."""

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        """Step `optimizer`, where the vendor's runtime wants to be told of it."""
        return optimizer.step(closure) if closure is not None else optimizer.step()

    def step_boundary(self) -> None:
        """Mark the end of a training step, where the vendor's runtime records work lazily."""

    def save(self, value: Any, path: Path) -> None:
        """Write `value` with `torch.save`, its tensors readable on a machine without the device."""
        torch.save(value, path)

    def start_process(self, topology: Topology) -> None:
        """Set up this process for its place in the job, before the device is opened: variables, threads."""

    def bind_cpu(self, topology: Topology) -> None:
        """Bind this process to the processor cores nearest to its device and set its number of threads."""

    def bind_to_cores(self, cores: Iterable[int]) -> None:
        """Bind every thread of this process to those of some processor cores that it may use; for `bind_cpu`.

        Raises:
            UnsupportedOperationError: if it may use none of them, or the operating system binds no processes.
        """
        if not hasattr(os, "sched_setaffinity"):
            raise UnsupportedOperationError("this operating system binds no processes to processor cores")
        wanted, allowed = set(cores), os.sched_getaffinity(0)
        if not wanted & allowed:
            raise UnsupportedOperationError(
                f"this process cannot be bound to the processor cores {sorted(wanted)}",
                found=f"it may use {sorted(allowed)}",
                hint="give it more cores, or leave out --enable-cpu-affinity",
            )
        # Affinity belongs to threads; those that start later inherit it from these.
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), wanted & allowed)
