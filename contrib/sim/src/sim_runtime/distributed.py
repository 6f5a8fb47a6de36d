"""`simccl`, the collectives for tensors of these devices, as a backend of `torch.distributed`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sim_runtime import _C


def register() -> None:
    """Make `init_process_group("simccl")` work, for tensors of the devices and of the host."""
    dist.Backend.register_backend("simccl", _process_group, devices=["sim", "cpu"])


def _process_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Return the process group of one process, over one of gloo that meets at the same store."""
    prefixed = dist.PrefixStore("simccl", store)  # type: ignore[attr-defined]
    return _C.ProcessGroup(dist.ProcessGroupGloo(prefixed, rank, size, timeout))
