"""Cambricon's MLUs as devices through `torch.mlu`, and CNCL: imported when they are chosen."""

from torchport.plugin import ModuleBackend, ProcessGroupCollectives


class MluBackend(ModuleBackend):
    """Cambricon's MLUs. Memory, random numbers, streams and pinned copies are those of `torch.mlu`."""

    package = "torch_mlu"


class CnclCollectives(ProcessGroupCollectives):
    """Cambricon's CNCL, beside gloo for objects and tensors on the host."""

    package = "torch_mlu"
    host_process_group = "gloo"
