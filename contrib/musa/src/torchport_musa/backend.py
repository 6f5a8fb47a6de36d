"""Moore Threads' GPUs as devices through `torch.musa`, and MCCL: imported when they are chosen."""

from torchport.plugin import ModuleBackend, ProcessGroupCollectives


class MusaBackend(ModuleBackend):
    """Moore Threads' GPUs. Memory, random numbers, streams and pinned copies are those of `torch.musa`."""

    package = "torch_musa"


class McclCollectives(ProcessGroupCollectives):
    """Moore Threads' MCCL, beside gloo for objects and tensors on the host."""

    package = "torch_musa"
    host_process_group = "gloo"
