"""Joining and leaving the default process group of `torch.distributed`."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torchport.errors import ConfigurationError
from torchport.plugin import Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SETTLE = 0.01
"""Seconds in which the threads of a group that is left may free the tensors of their last operations."""

_left: Any = None
"""The group that was left last. See `_let_go`."""


class Membership:
    """This process's part in the default process group.

    Args:
        collectives: Name of the collectives on whose behalf the group is joined.
        backend: Name of the backend in `torch.distributed`.
        topology: This process's place in the job.
    """

    def __init__(self, collectives: str, backend: str, topology: Topology) -> None:
        self.collectives, self.backend, self.topology = collectives, backend, topology
        self.owned = False

    def join(self, store: Store, timeout: timedelta) -> None:
        """Initialise the default group, or join the one that the script has initialised.

        Raises:
            ConfigurationError: if the script's own group does not fit the plan.
        """
        if dist.is_initialized():
            self._check_existing()
            return
        dist.init_process_group(
            self.backend,
            store=store,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            timeout=timeout,
        )
        self.owned = True

    def leave(self) -> None:
        """Destroy the default group if `join` initialised it and nobody has destroyed it since."""
        if self.owned and dist.is_initialized():
            group = dist.group.WORLD
            dist.destroy_process_group()
            _let_go(group)
        self.owned = False

    def _check_existing(self) -> None:
        backend = str(dist.get_backend_config())
        place = (dist.get_rank(), dist.get_world_size())
        wanted = (self.topology.rank, self.topology.world_size)
        found = f"torch.distributed is initialised with {backend}, rank {place[0]} of {place[1]}"
        hint = "remove init_process_group from the script, or give it the same backend, rank and world size"
        if place != wanted:
            raise ConfigurationError(
                f"collectives {self.collectives!r} want rank {wanted[0]} of {wanted[1]}",
                found=found,
                hint=hint,
            )
        if f"cpu:{self.backend}" not in backend.split(","):
            raise ConfigurationError(
                f"collectives {self.collectives!r} want the backend {self.backend!r} for CPU tensors",
                found=found,
                hint=hint,
            )


def _let_go(group: Any) -> None:
    """Give a group up without running its destructor while one of its threads waits for the interpreter.

    A thread of gloo frees the tensors of the operation it has just ended under the group's lock, and needs the
    interpreter for those that Python has seen. The group's destructor takes that lock and holds the interpreter: if
    the group goes first, both wait for ever. So the threads get time without the interpreter, and the group lives
    on until the next one is left: references to it elsewhere, as in `DistributedDataParallel`, may go at any time.
    """
    global _left
    _left = group
    time.sleep(_SETTLE)
