"""GPUs as devices through `torch.cuda`, and NCCL: imported when they are chosen."""

from __future__ import annotations

import functools
import importlib.util
import os
import re

import torch
from torchport.errors import UnsupportedOperationError
from torchport.plugin import Backend, Capabilities, ProcessGroupCollectives, Topology

from torchport_cuda.gpus import consumer_card, unset_switches, visible_gpus

_LEAST = {"float16": (0, 0), "bfloat16": (8, 0), "fp8": (8, 9), "mxfp8": (10, 0)}
"""The compute capability from which on NVIDIA's tensor cores compute in a format."""

_ROCM = {"float16": "gfx", "bfloat16": "gfx", "fp8": "gfx94|gfx95|gfx12", "mxfp8": "gfx95"}
"""The architectures of AMD's GPUs that compute in a format."""


class CudaBackend(Backend):
    """NVIDIA GPUs, and AMD GPUs under a PyTorch built with ROCm.

    Memory, random numbers, streams and pinned copies are those of `torch.cuda`. Nothing in a step waits for the
    device, so that it can be captured in a CUDA graph.
    """

    def device(self, local_rank: int) -> torch.device:
        """Return the GPU of this local rank, make it the current one, and apply the settings."""
        device = torch.device("cuda", self.device_index(local_rank))
        torch.cuda.set_device(device)
        tf32 = getattr(self.config, "tf32", None)
        if tf32 is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
        return device

    def capabilities(self) -> Capabilities:
        """Declare what all visible GPUs can do."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        formats = _rocm_formats() if torch.version.hip else _cuda_formats()
        return Capabilities(
            autocast=formats & {"float16", "bfloat16"},
            features=formats & {"fp8", "mxfp8"},
            grad_scaler=True,
            pinned_memory=True,
            streams=True,
            memory_stats=True,
            compile=importlib.util.find_spec("triton") is not None,
        )

    def start_process(self, topology: Topology) -> None:
        """Switch off what consumer cards do not have, before NCCL connects, unless its variables are set."""
        if topology.world_size > 1 and not torch.version.hip and unset_switches() and consumer_card():
            os.environ.update(dict.fromkeys(unset_switches(), "1"))

    def bind_cpu(self, topology: Topology) -> None:
        """Bind this process to the cores of the NUMA node nearest to its GPU.

        Raises:
            UnsupportedOperationError: where nobody tells which they are.
        """
        gpus = None if torch.version.hip else visible_gpus()
        if gpus is None:
            raise UnsupportedOperationError(
                "the cores nearest to a GPU are not known",
                reason="NVML tells them, of NVIDIA GPUs, through nvidia-ml-py",
                hint="pip install 'torchport-cuda[nvml]', or leave out --enable-cpu-affinity",
            )
        self.bind_to_cores(gpus[self.device_index(topology.local_rank)].cores)


def _cuda_formats() -> frozenset[str]:
    """Ask NVML before CUDA, which would be initialised: processes may fork."""
    gpus = None if torch.cuda.is_initialized() else visible_gpus()  # type: ignore[no-untyped-call]
    if gpus is None:
        indices = range(torch.cuda.device_count())
        capabilities = [torch.cuda.get_device_capability(index) for index in indices]
    else:
        capabilities = [gpu.capability for gpu in gpus]
    lowest = min(capabilities, default=(0, 0))
    return frozenset(name for name, least in _LEAST.items() if lowest >= least)


def _rocm_formats() -> frozenset[str]:
    indices = range(torch.cuda.device_count())
    names = [str(torch.cuda.get_device_properties(index).gcnArchName) for index in indices]
    return frozenset(
        format for format, kinds in _ROCM.items() if all(re.match(kinds, name) for name in names)
    )


class NcclCollectives(ProcessGroupCollectives):
    """NCCL (RCCL on ROCm), connected when it is opened, beside gloo for objects and tensors on the host."""

    host_process_group = "gloo"
    connects_at_once = True
