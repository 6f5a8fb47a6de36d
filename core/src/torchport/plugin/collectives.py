"""The interface to a way for processes to exchange tensors."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchport.errors import LaunchError, OperationError
from torchport.plugin.specs import CollectivesSpec, Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

DEFAULT_PORT = 29500
"""TCP port at which processes of one machine meet where the launcher left none."""

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers into one tensor; newer versions of PyTorch deprecate the second name."""


class Collectives(ABC):
    """A process group over which ranks exchange tensors: `open` and `close` to write, defaults for the rest.

    The defaults use the default group of `torch.distributed`, so that strategies built on it (DDP, sharding)
    work with any collectives that register a process group there.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    def __init__(self, spec: CollectivesSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    # --- to be written -----------------------------------------------------------------------------------

    @abstractmethod
    def open(self, topology: Topology, device: torch.device, timeout: timedelta, store: Store) -> None:
        """Join the job's process group.

        Args:
            topology: This process's place in the job.
            device: The device whose tensors will be exchanged.
            timeout: How long an operation may wait for other processes before it fails.
            store: A key-value store that all processes of the job share, from `rendezvous`.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""

    # --- meeting -----------------------------------------------------------------------------------------

    def rendezvous(self, topology: Topology, timeout: timedelta) -> Store:
        """Return a key-value store shared by all processes of the job.

        The default is the TCP store at `topology.master_addr:master_port` (the agent's own under torchrun).
        Where the launcher left no address, processes of one machine meet at 127.0.0.1:29500, and a job of one
        process has a private store.

        Raises:
            LaunchError: if the processes of several machines were given no address, or cannot meet there.
        """
        if topology.world_size == 1 and not topology.master_addr:
            return dist.HashStore()  # type: ignore[attr-defined]
        address, port = topology.master_addr, topology.master_port or DEFAULT_PORT
        if not address:
            if topology.local_world_size != topology.world_size:
                raise LaunchError(
                    f"collectives {self.spec.name!r} need an address at which the processes can meet",
                    found=f"{topology.world_size} processes on several machines, from {topology.source}",
                    hint="set MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a free port there",
                )
            address = "127.0.0.1"
        host = f"[{address}]" if ":" in address else address
        try:
            store, _, _ = next(
                dist.rendezvous(  # type: ignore[attr-defined]
                    f"tcp://{host}:{port}", topology.rank, topology.world_size, timeout=timeout
                )
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise LaunchError(
                f"rank {topology.rank} cannot meet the other processes at {address}:{port}",
                reason=str(error).splitlines()[0],
                hint="is the port in use, or the address wrong? They come from MASTER_ADDR and MASTER_PORT",
            ) from error
        # An elastic agent keeps its store when it starts the processes anew; what the last ones wrote is stale.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shared: Store = dist.PrefixStore(f"torchport/attempt/{attempt}", store)  # type: ignore[attr-defined]
        return shared

    # --- exchanging tensors ------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        return dist.get_world_size()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` over all processes, in place.

        Args:
            tensor: Any shape and dtype, the same on every process.
            op: `"sum"`, `"max"`, `"min"` or `"product"`.

        Returns:
            `tensor` itself.

        Raises:
            OperationError: if `op` is none of these.
        """
        if op not in _REDUCTIONS:
            raise OperationError(f"all_reduce has no operation {op!r}", hint=f"one of {sorted(_REDUCTIONS)}")
        dist.all_reduce(tensor, _REDUCTIONS[op])
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes along the first dimension, in order of rank.

        Args:
            tensor: Shape `(n, ...)`, the same on every process.

        Returns:
            Shape `(world_size * n, ...)`.
        """
        gathered = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather_single(gathered, tensor.contiguous())
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes and return this process's share of it.

        Args:
            tensor: Shape `(world_size * n, ...)`, the same on every process.

        Returns:
            Shape `(n, ...)`.
        """
        shares = list(tensor.contiguous().chunk(self.world_size))
        share = torch.empty_like(shares[0])
        dist.reduce_scatter(share, shares)
        return share

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite `tensor` on every process by that of rank `source`, and return it."""
        dist.broadcast(tensor, source)
        return tensor

    def scatter(
        self, tensor: torch.Tensor, parts: list[torch.Tensor] | None = None, source: int = 0
    ) -> torch.Tensor:
        """Overwrite `tensor` on each process by its part of what rank `source` holds, and return it.

        Args:
            tensor: Where this process's part goes; any shape and dtype, the same on every process.
            parts: On rank `source`, one part for each process; elsewhere `None`.
            source: The rank that holds them.
        """
        dist.scatter(tensor, parts, source)
        return tensor

    def barrier(self) -> None:
        """Wait until every process has come here."""
        dist.barrier()

    # --- exchanging objects ------------------------------------------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the (picklable) values of all processes, in order of rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object_list(self, values: list[Any], source: int = 0) -> list[Any]:
        """Overwrite the items of `values` on every process by those of rank `source`, and return it."""
        dist.broadcast_object_list(values, source)
        return values
