"""Huawei's Ascend NPUs as devices through `torch.npu`, and HCCL: imported when they are chosen."""

from torchport.plugin import ModuleBackend, ProcessGroupCollectives


class NpuBackend(ModuleBackend):
    """Huawei's Ascend NPUs. Memory, random numbers, streams and pinned copies are those of `torch.npu`."""

    package = "torch_npu"


class HcclCollectives(ProcessGroupCollectives):
    """Huawei's HCCL, beside gloo for objects and tensors on the host."""

    package = "torch_npu"
    process_group = "hccl"  # the plugin's own name is another: Gaudi's collectives are called hccl too
    host_process_group = "gloo"
