"""Tecorigin's SDAA accelerators as devices through `torch.sdaa`, and TCCL: imported when they are chosen."""

from torchport.plugin import ModuleBackend, ProcessGroupCollectives


class SdaaBackend(ModuleBackend):
    """Tecorigin's SDAA accelerators. Memory, random numbers, streams and pinned copies are those of `torch.sdaa`."""

    package = "torch_sdaa"


class TcclCollectives(ProcessGroupCollectives):
    """Tecorigin's TCCL, beside gloo for objects and tensors on the host."""

    package = "torch_sdaa"
    host_process_group = "gloo"
