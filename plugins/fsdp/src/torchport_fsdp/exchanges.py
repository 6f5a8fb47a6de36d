"""Exchanges of tensors between the processes of one group that gradients pass through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_to_all(parts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Hand the i-th part of a tensor to the i-th process, and return the parts that all have handed over.

    Args:
        parts: Shape `(processes, ...)`, the same on every process.
        group: The processes.

    Returns:
        The same shape: the i-th part is what the i-th process had for this one. Gradients go the same way back.
    """
    exchanged: torch.Tensor = _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]
    return exchanged


def all_gather(part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the parts of all processes, in order.

    Args:
        part: Shape `(...)`, the same on every process.
        group: The processes.

    Returns:
        Shape `(processes, ...)`. The gradient of a part is the sum of those that all processes have for it.
    """
    gathered: torch.Tensor = _AllGather.apply(part, group)  # type: ignore[no-untyped-call]
    return gathered


def swap(parts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Do what `all_to_all` does, without gradients."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def hand_on(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Send a tensor to the next process of a ring, and return what the one before has sent; without gradients."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    following, before = ((rank + step) % size for step in (1, -1))
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, dist.get_global_rank(group, following), group),
            dist.P2POp(dist.irecv, received, dist.get_global_rank(group, before), group),
        ]
    )
    for work in works:
        work.wait()
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return swap(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return swap(gradients[0], ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())
        ]
        dist.all_gather(gathered, part.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        received = swap(gradients[0], ctx.group)
        return received.sum(0, dtype=torch.promote_types(received.dtype, torch.float32)).to(
            received.dtype
        ), None
