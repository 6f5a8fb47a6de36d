"""Collectives over a process group of `torch.distributed`: joining and leaving the default one."""

from __future__ import annotations

import importlib
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchport.errors import ConfigurationError
from torchport.plugin.collectives import Collectives
from torchport.plugin.specs import Topology

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
        device_type: Type of the devices whose tensors that backend carries.
    """

    def __init__(self, collectives: str, backend: str, topology: Topology, device_type: str = "cpu") -> None:
        self.collectives, self.backend, self.topology = collectives, backend, topology
        self.device_type = device_type
        self.owned = False

    def join(
        self, store: Store, timeout: timedelta, *, host: str = "", bound_to: torch.device | None = None
    ) -> None:
        """Initialise the default group, or join the one that the script has initialised.

        Args:
            store: The key-value store of the job.
            timeout: How long an operation may wait for other processes.
            host: Name of the backend for tensors on the host, beside that for the device's; empty for none.
            bound_to: The device to connect at once; `None` connects with the first operation.

        Raises:
            ConfigurationError: if the script's own group does not fit the plan.
        """
        if dist.is_initialized():
            self._check_existing()
            return
        beside = f"cpu:{host},{self.device_type}:{self.backend}"
        dist.init_process_group(
            beside if host else self.backend,
            store=store,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            timeout=timeout,
            device_id=bound_to,
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
        if f"{self.device_type}:{self.backend}" not in backend.split(","):
            raise ConfigurationError(
                f"collectives {self.collectives!r} want the backend {self.backend!r} for tensors of"
                f" {self.device_type}",
                found=found,
                hint=hint,
            )


class ProcessGroupCollectives(Collectives):
    """Collectives over a backend that is registered with `torch.distributed`, by its name there.

    A default group that the script has initialised already is joined as it is, and left to the script to destroy.
    A subclass needs to write nothing; these are for it to set.

    Attributes:
        package: Name of a vendor's module whose import registers the backend; empty for none.
        process_group: Name of the backend in `torch.distributed`; empty: that of the descriptor.
        host_process_group: Name of a backend for tensors on the host, beside it; empty for none. Objects are exchanged
            over it too.
        connects_at_once: Whether the group is bound to the process's device, and connected when it is opened.
    """

    package: str = ""
    process_group: str = ""
    host_process_group: str = ""
    connects_at_once: bool = False
    _membership: Membership | None = None

    def register(self) -> None:
        """Make the backend known to `torch.distributed`: import the vendor's package."""
        if self.package:
            importlib.import_module(self.package)

    def open(self, topology: Topology, device: torch.device, timeout: timedelta, store: Store) -> None:
        """Initialise the default process group, or join the script's own.

        Raises:
            ConfigurationError: if the script's own group has another size or rank than the topology.
        """
        self.register()
        name = self.process_group or self.spec.name
        self._membership = Membership(self.spec.name, name, topology, device.type)
        bound_to = device if self.connects_at_once else None
        self._membership.join(store, timeout, host=self.host_process_group, bound_to=bound_to)

    def close(self) -> None:
        """Destroy the process group if `open` initialised it."""
        if self._membership is not None:
            self._membership.leave()


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
