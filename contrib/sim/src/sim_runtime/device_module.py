"""`torch.sim`, the module that PyTorch asks about devices of this type, as `torch.cuda` is for others.

Devices, streams and memory are those of `torch.accelerator`; what is added here are their names and random numbers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.accelerator import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
)
from torch.accelerator import get_memory_info as mem_get_info

import sim_runtime
from sim_runtime import _C

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "seed_all",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]

Device = torch.device | str | int | None
"""A device, its name or its number; `None` is the current one."""

_initialized = False
_forked = False


def _index(device: Device) -> int:
    """Return the number of a device."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _C.current_device() if index is None else index


# --- life cycle ----------------------------------------------------------------------------------------------


def _lazy_init() -> None:
    """Be told by PyTorch that the device is about to be used: like a real one, it cannot be after a fork."""
    global _initialized
    if _forked:
        raise RuntimeError(
            "Cannot re-initialize sim in forked subprocess. To use sim with multiprocessing, you must use the"
            " 'spawn' start method"
        )
    _initialized = True


def _after_fork() -> None:
    global _forked
    _forked = _initialized


os.register_at_fork(after_in_child=_after_fork)


def _is_in_bad_fork() -> bool:
    return _forked


def is_initialized() -> bool:
    """Whether a device has been used in this process."""
    return _initialized and not _forked


def is_available() -> bool:
    """Whether there is a device."""
    return _C.device_count() > 0


# --- devices -------------------------------------------------------------------------------------------------


def device_count() -> int:
    """Return the number of devices that this process sees."""
    return int(_C.device_count())


def current_device() -> int:
    """Return the number of this thread's current device."""
    return int(_C.current_device())


def set_device(device: Device) -> None:
    """Make a device the current one of this thread."""
    _lazy_init()
    _C.exchange_device(_index(device))


class device:
    """Make a device the current one inside a `with` block.

    Args:
        device: The device.
    """

    def __init__(self, device: Device) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.previous = _C.exchange_device(self.index)

    def __exit__(self, *error: object) -> None:
        _C.exchange_device(self.previous)


def synchronize(device: Device = None) -> None:
    """Wait until the work of a device is done."""
    torch.accelerator.synchronize(_index(device))


def get_device_name(device: Device = None) -> str:
    """Return the name of a device, with its number on this machine."""
    return f"Simulated device {sim_runtime.visible_devices()[_index(device)]}"


def get_device_capability(device: Device = None) -> dict[str, Any]:
    """Return the dtypes that a device supports, as `torch.accelerator.get_device_capability` does."""
    return torch.accelerator.get_device_capability(_index(device))


# --- streams and events --------------------------------------------------------------------------------------


class Stream(torch.Stream):
    """A queue of work of a device. Making one gives a plain `torch.Stream`.

    Args:
        device: The device.
        priority: Without effect.
    """

    def __new__(  # type: ignore[misc]
        cls, device: Device = None, priority: int = 0, **options: Any
    ) -> torch.Stream:
        """Return a new stream."""
        return torch.Stream(torch.device("sim", _index(device)), priority=priority)


class Event(torch.Event):
    """A point in the work of a stream. Making one gives a plain `torch.Event`.

    Args:
        enable_timing: Whether the time between two of them can be asked for.
    """

    def __new__(  # type: ignore[misc]
        cls, enable_timing: bool = False, **options: Any
    ) -> torch.Event:
        """Return a new event."""
        return torch.Event("sim", enable_timing=enable_timing)


def current_stream(device: Device = None) -> torch.Stream:
    """Return this thread's current stream of a device."""
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Device = None) -> torch.Stream:
    """Return the stream that is the current one of a device to begin with."""
    kind = current_stream(device).device_type
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=kind)


def set_stream(stream: torch.Stream) -> None:
    """Make a stream the current one of its device."""
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Queue the work of a `with` block on a stream; `None` changes nothing."""
    if stream is None:
        yield
        return
    with stream:
        yield


# --- random numbers ------------------------------------------------------------------------------------------


def _generators() -> Iterable[torch.Generator]:
    return [_C.default_generator(index) for index in range(device_count())]


def get_rng_state(device: Device = None) -> torch.Tensor:
    """Return the state of a device's default generator: a one-dimensional uint8 tensor on the host."""
    return _C.default_generator(_index(device)).get_state()


def set_rng_state(new_state: torch.Tensor, device: Device = None) -> None:
    """Restore what `get_rng_state` returned."""
    _C.default_generator(_index(device)).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """Return the states of the default generators of all devices."""
    return [generator.get_state() for generator in _generators()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Restore what `get_rng_state_all` returned."""
    for generator, state in zip(_generators(), new_states, strict=True):
        generator.set_state(state)


def manual_seed(seed: int) -> None:
    """Seed the default generator of the current device."""
    _C.default_generator(-1).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed the default generators of all devices."""
    for generator in _generators():
        generator.manual_seed(seed)


def seed_all() -> None:
    """Seed the default generators of all devices with one number by chance."""
    manual_seed_all(_C.default_generator(-1).seed())


def initial_seed() -> int:
    """Return the seed of the current device's default generator."""
    return int(_C.default_generator(-1).initial_seed())


# --- number formats ------------------------------------------------------------------------------------------


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that `torch.autocast` may work in."""
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    """Whether there is arithmetic in bfloat16."""
    return True
