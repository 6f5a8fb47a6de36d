"""Turn any picklable structure into one tensor of bytes, in which its tensors lie as they are."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

_ALIGNMENT = 16  # bytes; every dtype's size divides it
_HEADER = 8  # bytes of the length of the pickled part


class _Pickler(pickle.Pickler):
    """Leaves dense tensors out and lists them instead."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.size = 0

    def persistent_id(self, thing: Any) -> Any:
        if type(thing) is not torch.Tensor or thing.layout is not torch.strided or thing.is_quantized:
            return None
        position = self.size
        self.tensors.append(thing)
        self.size += _padded(thing.numel() * thing.element_size())
        return position, thing.dtype, tuple(thing.shape)


class _Unpickler(pickle.Unpickler):
    """Puts tensors in that share the memory of the bytes."""

    def __init__(self, file: io.BytesIO, packed: torch.Tensor) -> None:
        super().__init__(file)
        self.packed = packed

    def persistent_load(self, pid: Any) -> torch.Tensor:
        position, dtype, shape = pid
        number = torch.Size(shape).numel()
        part = self.packed[position : position + number * dtype.itemsize]
        return part.view(dtype).view(shape)


def pack(value: Any) -> torch.Tensor:
    """Return a picklable structure as bytes: a one-dimensional uint8 tensor in host memory.

    Args:
        value: Anything picklable. Dense tensors in it are copied, from any device, and lose their gradients.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    described = file.getvalue()
    begin = _padded(_HEADER + len(described))
    packed = torch.empty(begin + pickler.size, dtype=torch.uint8)
    packed[:_HEADER] = torch.tensor([len(described)]).view(torch.uint8)
    packed[_HEADER : _HEADER + len(described)] = torch.frombuffer(bytearray(described), dtype=torch.uint8)
    for tensor in pickler.tensors:
        size = tensor.numel() * tensor.element_size()
        if size:
            into = packed[begin : begin + size].view(tensor.dtype).view(tensor.shape)
            into.copy_(tensor.detach())
        begin += _padded(size)
    return packed


def unpack(packed: torch.Tensor) -> Any:
    """Return what `pack` was given. Tensors share the memory of `packed`, on its device."""
    length = int(packed[:_HEADER].cpu().view(torch.int64))
    described = packed[_HEADER : _HEADER + length].cpu().numpy().tobytes()
    return _Unpickler(io.BytesIO(described), packed[_padded(_HEADER + length) :]).load()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
