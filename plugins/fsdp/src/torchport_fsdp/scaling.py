"""Loss scaling where each process sees the gradients of its own part only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchport.plugin.binding import ScaledStep


class ShardedScaledStep(ScaledStep):
    """Skips a step on every process if a gradient overflowed on any."""

    def unscale(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Divide the scale out, and tell the other processes of infinities found here."""
        waiting = [key for key in self.optimizers if key not in self.unscaled]
        super().unscale(optimizer)
        for key in waiting:
            if key in self.unscaled:
                state = self.scaler._per_optimizer_states[key]  # where PyTorch's own sharded scaler looks too
                for found in state["found_inf_per_device"].values():
                    dist.all_reduce(found, dist.ReduceOp.MAX)

    def step(self, optimizer: torch.optim.Optimizer, closure: object = None) -> bool:
        """Step on every process, or on none."""
        if closure is None:
            self.unscale(optimizer)
        return super().step(optimizer, closure)  # type: ignore[arg-type]
