"""Gather tensors of which each process first shows shape and dtype, so that a difference is an error on all of them.

Gloo and MPI end the process when they receive more or less than they expect. Here a first message of fixed size
carries shape and dtype and, if it fits, the tensor itself: small tensors, such as metrics, take one exchange as
before; others take a second one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torchport.errors import OperationError

_DIMENSIONS = 14
_LAYOUT = struct.Struct(f"={_DIMENSIONS + 2}q")
_HEADER = _LAYOUT.size
_MESSAGE = 8192
"""Bytes of the first message, header included."""

_DTYPES = tuple(sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str))
_PADDING = (0,) * _DIMENSIONS
_ZEROS = torch.zeros(_MESSAGE, dtype=torch.uint8)
_NUMBER = {dtype: number for number, dtype in enumerate(_DTYPES)}


def all_gather(
    tensor: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor], world_size: int
) -> torch.Tensor:
    """Concatenate the tensors of all processes along the first dimension, in order of rank.

    Args:
        tensor: Shape `(n, ...)`, on the host.
        gather: The same without a check.
        world_size: Number of processes.

    Returns:
        Shape `(world_size * n, ...)`.

    Raises:
        OperationError: on every process, if shapes or dtypes differ; it names those of each rank.
    """
    shape = tuple(tensor.shape)
    size = tensor.numel() * tensor.element_size()
    fits = size <= _MESSAGE - _HEADER
    sizes = (*shape, *_PADDING)[:_DIMENSIONS]
    header = _LAYOUT.pack(_NUMBER[tensor.dtype], len(shape), *sizes)
    parts = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
    if fits and size:
        parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8))
    parts.append(_ZEROS[: _MESSAGE - _HEADER - (size if fits else 0)])
    messages = gather(torch.cat(parts)).view(world_size, _MESSAGE)
    received = messages.numpy()
    headers = [received[rank, :_HEADER].tobytes() for rank in range(world_size)]
    if any(other != header for other in headers):
        raise _difference([_describe(_LAYOUT.unpack(other)) for other in headers])
    if not fits:
        return gather(tensor)
    whole = (world_size * shape[0], *shape[1:])
    return messages[:, _HEADER : _HEADER + size].reshape(-1).view(tensor.dtype).view(whole)


def _describe(header: tuple[int, ...]) -> str:
    shape = tuple(header[2 : 2 + min(header[1], _DIMENSIONS)])
    return f"{shape} {str(_DTYPES[header[0]]).removeprefix('torch.')}"


def _difference(described: list[str]) -> OperationError:
    listed = "\n".join(f"    rank {rank}: {shape}" for rank, shape in enumerate(described))
    return OperationError(
        "gather needs tensors of the same shape and dtype on every process",
        found=f"\n{listed}",
        hint="pad_across_processes(tensor, dim=...) before it, or gather_object for lists of different lengths",
    )
