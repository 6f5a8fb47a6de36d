"""PyTorch's own collectives over TCP and shared memory."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torchport.plugin import Collectives, Topology

from torchport_cpu import checked
from torchport_cpu.membership import Membership

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class GlooCollectives(Collectives):
    """The gloo process group that comes with PyTorch.

    A default group that the script has initialised already is joined as it is, and left to the script to
    destroy.
    """

    def open(self, topology: Topology, device: torch.device, timeout: timedelta, store: Store) -> None:
        """Initialise the default process group, or join the script's own.

        Raises:
            ConfigurationError: if the script's own group has another size or rank than the topology.
        """
        self._membership = Membership(self.spec.name, "gloo", topology)
        self._membership.join(store, timeout)

    def close(self) -> None:
        """Destroy the process group if `open` initialised it."""
        self._membership.leave()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes, once all have shown that shape and dtype are the same.

        Raises:
            OperationError: on every process, if they are not.
        """
        return checked.all_gather(tensor, super().all_gather, self.world_size)
