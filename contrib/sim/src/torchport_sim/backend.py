"""The device: imported when it is chosen. What is not here works through `torch.sim`, by Torchport's defaults."""

from __future__ import annotations

import sim_runtime
import torch
from torchport.plugin import Backend, Capabilities


class SimBackend(Backend):
    """Simulated devices. Each process of a machine has one of its own."""

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this process, and make it the current one.

        Raises:
            LaunchError: if there are more processes than devices.
        """
        sim_runtime.load()  # registers the type with PyTorch, as `import torch_acme` does for another vendor
        device = torch.device(self.spec.device_type, self.device_index(local_rank))
        self.module.set_device(device)
        return device

    def capabilities(self) -> Capabilities:
        """Declare autocast, loss scaling, process groups, pinned memory, streams, memory figures, compilation."""
        return Capabilities(
            autocast=frozenset({"bfloat16", "float16"}),
            grad_scaler=True,
            distributed=True,
            pinned_memory=True,
            streams=True,
            memory_stats=True,
            compile=True,
        )

    def compile_backend(self) -> str:
        """Return the backend of `torch.compile` that traces models and generates no code."""
        return "aot_eager"
