"""Copies of tensors in host memory that is kept from one copy to the next."""

from __future__ import annotations

import copy
import ctypes
import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from torchport.checkpoint.weights import storage_address
from torchport.plugin.backend import Backend

_ALIGNMENT = 64  # bytes
_PIECE = 1 << 26  # bytes copied at a time
_MUCH = 1 << 26  # bytes from which on several threads copy
_THREADS = 4  # one processor core alone does not use all of the memory's bandwidth
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


@dataclass(slots=True)
class _Place:
    """A storage of the original, as bytes, and its copy."""

    source: torch.Tensor
    copied: torch.Tensor


class HostBuffers:
    """Host memory that snapshots are copied into.

    It is as large as the largest snapshot so far and is used again by the next one, since memory that is new to
    the process is several times slower to write to. A snapshot is valid until the next one is taken.

    Args:
        backend: The backend of the run, which pins memory and waits for copies.
        device: The device of this process.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend = backend
        self.device = device
        self._memory: memoryview | None = None
        self._pinned = False

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return 0 if self._memory is None else self._memory.nbytes

    def release(self) -> None:
        """Give the memory back, once nothing refers to the last snapshot."""
        self._memory = None

    def snapshot(self, states: Sequence[Any]) -> list[Any]:
        """Return copies of states that nothing done to the originals changes.

        Tensors that share memory share it in the copies too.

        Args:
            states: Dictionaries, lists, tuples and sets of tensors (on any device) and plain values.

        Returns:
            The same structures, with tensors on the host.
        """
        walk = _Walk()
        for state in states:
            walk.collect(state)
        self._reserve(walk)
        offset = 0
        for place in walk.places.values():
            size = place.source.numel()
            if size:
                place.copied = torch.frombuffer(self._memory, dtype=torch.uint8, offset=offset, count=size)
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        _copy(list(walk.places.values()), not walk.has_devices)
        if self.device.type != "cpu":
            self.backend.synchronize(self.device)
        return [walk.copied(state) for state in states]

    def _reserve(self, walk: _Walk) -> None:
        """Have enough memory: page-locked if something comes from a device."""
        needed = sum(-(-place.source.numel() // _ALIGNMENT) * _ALIGNMENT for place in walk.places.values())
        pinned = walk.has_devices
        if needed <= self.nbytes and (self._pinned or not pinned):
            return
        self._memory = None  # before the new memory is taken
        if pinned:
            memory = self.backend.pin(torch.empty(needed, dtype=torch.uint8))
            self._memory = memory.numpy().data
        else:
            pages = mmap.mmap(-1, max(needed, mmap.PAGESIZE))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = memoryview(pages)
        self._pinned = pinned


class _Walk:
    """Visits the tensors of states, in the same order when they are collected and when they are replaced."""

    def __init__(self) -> None:
        self.places: OrderedDict[tuple[Any, ...], _Place] = OrderedDict()
        self._seen: set[int] = set()
        self._done: dict[int, Any] = {}

    @property
    def has_devices(self) -> bool:
        """Whether something is to be copied from the memory of a device."""
        return any(place.source.device.type != "cpu" for place in self.places.values())

    def collect(self, value: Any) -> None:
        """Note the storages that are to be copied."""
        if isinstance(value, torch.Tensor):
            key = _storage_key(value)
            if key is not None and key not in self.places:
                storage = value.untyped_storage()
                source = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
                self.places[key] = _Place(source, torch.empty(0, dtype=torch.uint8))
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in self._seen:
            self._seen.add(id(value))
            for held in value.values() if isinstance(value, dict) else value:
                self.collect(held)

    def copied(self, value: Any) -> Any:
        """Return a value with all that can change replaced by its copy."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._copied(value, kind)
        return self._done[id(value)]

    def _copied(self, value: Any, kind: type) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind in (dict, OrderedDict):
            result = self._done[id(value)] = kind()
            for key, held in value.items():
                result[key] = self.copied(held)
            return result
        if kind is list:
            items = self._done[id(value)] = []
            items.extend(self.copied(held) for held in value)
            return items
        if kind in (tuple, set):
            return kind(self.copied(held) for held in value)
        return copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        key = _storage_key(value)
        if key is None:
            return value.detach().to("cpu", copy=True)
        made = torch.empty(0, dtype=value.dtype).set_(
            self.places[key].copied.untyped_storage(), value.storage_offset(), value.size(), value.stride()
        )
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=value.requires_grad)
        return made


def _storage_key(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what tells the memory of an ordinary tensor from others'; `None` for tensors to be copied whole."""
    ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    if not ordinary or value.is_quantized or value.is_conj() or value.is_neg() or value.is_meta:
        return None
    address, size = storage_address(value), value.untyped_storage().nbytes()
    if address == 0 and size:  # a device whose runtime hides where memory is
        return None
    return value.device, address, size


def _copy(places: Sequence[_Place], on_host: bool) -> None:
    """Copy all storages; from the host's memory in several threads where there is much of it."""
    if not on_host:
        for place in places:
            place.copied.copy_(place.source, non_blocking=True)
        return
    pieces = [
        (place.copied.data_ptr() + start, place.source.data_ptr() + start, min(_PIECE, size - start))
        for place in places
        for size in (place.source.numel(),)
        for start in range(0, size, _PIECE)
    ]
    remaining = iter(pieces)  # shared: each piece goes to the thread that asks for it first

    def work() -> None:
        for copied, source, size in remaining:
            # Beyond some size the C library writes past the caches, which PyTorch's copy_ does not.
            ctypes.memmove(copied, source, size)

    number = _THREADS if sum(size for *_, size in pieces) >= _MUCH else 1
    others = [threading.Thread(target=work) for _ in range(number - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
