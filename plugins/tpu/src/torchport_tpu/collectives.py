"""The collectives of torch_xla: tensors between devices, objects and the host's tensors over gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.distributed.xla_backend
import torch_xla.runtime as xr
from torchport.errors import OperationError
from torchport.plugin import ProcessGroupCollectives, Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


class XlaCollectives(ProcessGroupCollectives):
    """The process group `xla` for tensors of the device, and a group of gloo beside it for the rest.

    Under the strategy `spmd` the processes are machines, whose devices the compiler connects. torch_xla has no
    process group then, so that what the script exchanges itself goes through the host.
    """

    process_group = "xla"

    def open(self, topology: Topology, device: torch.device, timeout: timedelta, store: Store) -> None:
        """Initialise the default process group, or join the script's own; and the group of the host."""
        self._over_host = xr.is_spmd()
        if self._over_host:
            self.process_group, device = "gloo", torch.device("cpu")
        super().open(topology, device, timeout, store)
        self._host: Any = dist.new_group(backend="gloo", timeout=timeout)

    def close(self) -> None:
        """Run what is recorded, and destroy the process group if `open` initialised it."""
        torch_xla.sync()
        super().close()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` over all processes, in place; see `Collectives.all_reduce`."""
        if not self._on_host(tensor):
            return super().all_reduce(tensor, op)
        if op not in _REDUCTIONS:
            raise OperationError(f"all_reduce has no operation {op!r}", hint=f"one of {sorted(_REDUCTIONS)}")
        staged = tensor.cpu()
        dist.all_reduce(staged, _REDUCTIONS[op], group=self._host)
        return _put(tensor, staged)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes along the first dimension, in order of rank."""
        if not self._on_host(tensor):
            return super().all_gather(tensor)
        staged = tensor.cpu().contiguous()
        parts = [torch.empty_like(staged) for _ in range(self.world_size)]
        dist.all_gather(parts, staged, group=self._host)
        return torch.cat(parts).to(tensor.device)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes and return this process's share of it."""
        if not self._on_host(tensor):
            return super().reduce_scatter(tensor)
        return self.all_reduce(tensor.clone()).chunk(self.world_size)[dist.get_rank()].clone()

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite `tensor` on every process by that of rank `source`, and return it."""
        if not self._on_host(tensor):
            return super().broadcast(tensor, source)
        staged = tensor.cpu()
        dist.broadcast(staged, source, group=self._host)
        return _put(tensor, staged)

    def scatter(
        self, tensor: torch.Tensor, parts: list[torch.Tensor] | None = None, source: int = 0
    ) -> torch.Tensor:
        """Overwrite `tensor` on each process by its part of what rank `source` holds, over the host."""
        staged = tensor.cpu()
        sent = None if parts is None else [part.cpu() for part in parts]
        dist.scatter(staged, sent, source, group=self._host)
        return _put(tensor, staged)

    def barrier(self) -> None:
        """Run what is recorded, and wait on the host until every process has come here."""
        torch_xla.sync()
        dist.barrier(group=self._host)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank, over the host."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def broadcast_object_list(self, values: list[Any], source: int = 0) -> list[Any]:
        """Overwrite the items of `values` on every process by those of rank `source`, over the host."""
        dist.broadcast_object_list(values, source, group=self._host)
        return values

    def _on_host(self, tensor: torch.Tensor) -> bool:
        return self._over_host or tensor.device.type == "cpu"


def _put(tensor: torch.Tensor, staged: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with the values of what was exchanged on the host."""
    return tensor if staged is tensor else tensor.copy_(staged)
