"""Huawei's Ascend NPUs as devices through `torch.npu`, and HCCL: imported when they are chosen."""

from __future__ import annotations

import functools
import importlib

import torch
from torchport.plugin import Backend, BackendSpec, Capabilities, ProcessGroupCollectives

MODULE = "torch_npu"


class NpuBackend(Backend):
    """Huawei's Ascend NPUs. Memory, random numbers, streams and pinned copies are those of `torch.npu`."""

    def __init__(self, spec: BackendSpec, config: None = None) -> None:
        super().__init__(spec, config)
        importlib.import_module(MODULE)  # registers the device where PyTorch does not load it by itself

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this local rank, and make it the current one."""
        device = torch.device(self.spec.device_type, self.device_index(local_rank))
        self.module.set_device(device)
        return device

    def capabilities(self) -> Capabilities:
        """Declare what the vendor documents; bf16 where its module says so."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        bf16 = bool(getattr(self.module, "is_bf16_supported", bool)())
        return Capabilities(
            autocast=frozenset({"float16", "bfloat16"} if bf16 else {"float16"}),
            grad_scaler=True,
            pinned_memory=True,
            streams=True,
            memory_stats=True,
        )


class HcclCollectives(ProcessGroupCollectives):
    """Huawei's HCCL, beside gloo for objects and tensors on the host."""

    process_group = "hccl"  # the plugin's own name is another: Gaudi's collectives are called hccl too
    host_process_group = "gloo"

    def register(self) -> None:
        """Let the vendor's package register its process group with `torch.distributed`."""
        importlib.import_module(MODULE)
