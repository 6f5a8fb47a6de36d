"""Batches on their way to the device, read and moved ahead by the threads of torch_xla's parallel loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch_xla.core.xla_model as xm
import torch_xla.distributed.parallel_loader as pl
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torchport.ops.pytree import recursively_apply

READ_AHEAD = 4
"""Batches that may wait on the host."""

ON_DEVICE = 2
"""Batches that may wait on the device; as many are moved at a time."""


class DeviceFeed:
    """Gives batches on the device; before each, the step recorded so far is run.

    The loader that it belongs to counts batches as they are given out, so that what is read ahead changes neither
    accumulation windows nor the place that a checkpoint remembers.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches on the device; under a mesh, spread over its first axis."""
        source = _Source(batches)
        mesh = xs.get_global_mesh() if xr.is_spmd() else None
        loader = _Loader(
            source,
            [self.device],
            loader_prefetch_size=READ_AHEAD,
            device_prefetch_size=ON_DEVICE,
            input_sharding=None if mesh is None else BatchSharding(mesh),
        )
        try:
            yield from loader.per_device_loader(self.device)
        finally:
            loader.close()
        if source.error is not None:
            raise source.error


class BatchSharding:
    """How tensors of any number of dimensions are spread: the first over the first axis of a mesh.

    Args:
        mesh: The devices. Where several machines have a part each, a batch is the part of its machine.
    """

    def __init__(self, mesh: xs.Mesh) -> None:
        self.mesh = mesh
        self.minibatch = xr.process_count() > 1
        self._specs: dict[int, Any] = {}

    def xla_spec(self, tensor: torch.Tensor) -> Any:
        """Return the specification of one tensor; a number is held whole on every device."""
        if tensor.ndim not in self._specs:
            axes = (self.mesh.axis_names[0], *[None] * (tensor.ndim - 1)) if tensor.ndim else None
            self._specs[tensor.ndim] = axes and xs.ShardingSpec(self.mesh, axes, minibatch=self.minibatch)
        spec = self._specs[tensor.ndim]
        return None if spec is None else spec.xla_spec(tensor)


class _Source:
    """Batches that are read in another thread, and the error that ended them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.batches
        except Exception as error:
            self.error = error


class _Loader(pl.ParallelLoader):  # type: ignore[misc]
    """The parallel loader, which keeps the types of containers: its own makes lists of tuples."""

    def send_cpu_data_to_device(self, batches: list[Any], device: torch.device) -> Any:
        """Move the tensors of several batches at once."""
        tensors: list[torch.Tensor] = []
        recursively_apply(tensors.append, batches)
        if not tensors:
            return batches
        moved = iter(xm.send_cpu_data_to_device(tensors, device, self._input_sharding))
        return recursively_apply(lambda _: next(moved), batches)
