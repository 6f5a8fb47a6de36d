"""PyTorch's own collectives over TCP and shared memory."""

from __future__ import annotations

import torch
from torchport.plugin import ProcessGroupCollectives

from torchport_cpu import checked


class GlooCollectives(ProcessGroupCollectives):
    """The gloo process group that comes with PyTorch."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes, once all have shown that shape and dtype are the same.

        Raises:
            OperationError: on every process, if they are not.
        """
        return checked.all_gather(tensor, super().all_gather, self.world_size)
