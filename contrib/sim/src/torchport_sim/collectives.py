"""The process group: imported when it has been chosen."""

from __future__ import annotations

import sim_runtime
from torchport.plugin import ProcessGroupCollectives


class SimCollectives(ProcessGroupCollectives):
    """`simccl` as the default process group of `torch.distributed`, for tensors of the devices and of the host."""

    def register(self) -> None:
        """Load the runtime, which makes `simccl` known to `torch.distributed`."""
        sim_runtime.load()
