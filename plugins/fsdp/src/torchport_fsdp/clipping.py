"""Gradient clipping where gradients are spread over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchport_fsdp.parameters import local_of

_SMALL = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Clip gradients to a total norm, as `torch.nn.utils.clip_grad_norm_` does with whole ones.

    Each process takes the norm of its parts; one exchange for each way of sharding adds them up. Gradients that are
    whole on every process count once.

    Args:
        parameters: Parameters, sharded or not.
        max_norm: The largest norm.
        norm_type: Which norm; may be `inf`.

    Returns:
        The norm before, a tensor without dimensions, the same on every process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norm_type = float(norm_type)
    total = _total_norm(gradients, norm_type)
    factor = torch.clamp(max_norm / (total + _SMALL), max=1.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        local = local_of(gradient)
        by_device.setdefault(local.device, []).append(local)
    for device, local_ones in by_device.items():
        torch._foreach_mul_(local_ones, factor.to(device))
    return total


@torch.no_grad()
def clip_grad_value(parameters: Iterable[torch.Tensor], value: float) -> None:
    """Clip each element of the gradients to `[-value, value]`."""
    local = [local_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if local:
        torch._foreach_clamp_min_(local, -value)
        torch._foreach_clamp_max_(local, value)


def _total_norm(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norm over all gradients, adding powers (or taking the largest) over processes."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(layout, []).append(gradient)
    largest = math.isinf(norm_type)
    double = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if double else torch.float32
    home: torch.device | None = None
    parts = []
    for layout, members in groups.items():
        device = members[0].device if layout is None else torch.device(layout[0].device_type)
        home = home or device
        held = [local for local in map(local_of, members) if local.numel()] or [torch.zeros(1)]
        norms = torch._foreach_norm(held, norm_type)
        stacked = torch.stack([norm.to(device, dtype) for norm in norms])
        part = stacked.max() if largest else stacked.pow(norm_type).sum()
        if layout is not None:
            mesh, placements = layout
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            for dimension, placement in enumerate(placements):
                if placement.is_partial():
                    raise NotImplementedError("gradients that are partial sums cannot be clipped")
                if not placement.is_replicate() and mesh.size(dimension) > 1:
                    dist.all_reduce(part, operation, group=mesh.get_group(dimension))
        parts.append(part.to(home))
    together = torch.stack(parts)
    return together.max() if largest else together.sum().pow(1.0 / norm_type)
