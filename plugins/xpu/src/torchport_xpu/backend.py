"""Intel GPUs as devices through `torch.xpu`, and XCCL: imported when they are chosen."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util

import torch
from torchport.plugin import Backend, Capabilities, PrepareRequest, ProcessGroupCollectives

_IPEX = "intel-extension-for-pytorch"


class XpuBackend(Backend):
    """Intel GPUs. Memory, random numbers, streams and pinned copies are those of `torch.xpu`."""

    def device(self, local_rank: int) -> torch.device:
        """Return the GPU of this local rank, and make it the current one."""
        device = torch.device("xpu", self.device_index(local_rank))
        torch.xpu.set_device(device)
        return device

    def capabilities(self) -> Capabilities:
        """Declare what all visible GPUs can do. Loss scaling computes in float64, which some have not."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        indices = range(torch.xpu.device_count())
        return Capabilities(
            autocast=frozenset({"bfloat16", "float16"}),
            grad_scaler=all(torch.xpu.get_device_properties(index).has_fp64 for index in indices),
            pinned_memory=True,
            streams=True,
            memory_stats=True,
            compile=importlib.util.find_spec("triton") is not None,
        )

    def adapt(self, request: PrepareRequest) -> None:
        """Let Intel's extension optimise a model with its optimizer, or models for evaluation, where it fits PyTorch.

        The extension ended with PyTorch 2.8; what it brought is in PyTorch since.
        """
        if not ipex_fits() or not request.models:
            return
        ipex = importlib.import_module("intel_extension_for_pytorch")
        dtype = request.context.precision.compute_dtype
        if request.evaluation_only:
            for model in request.models:
                ipex.optimize(model.eval(), dtype=dtype, inplace=True)
        elif len(request.models) == len(request.optimizers) == 1 and all(request.device_placement):
            model = request.models[0].to(request.context.device)
            ipex.optimize(model, optimizer=request.optimizers[0], dtype=dtype, inplace=True)


def ipex_fits() -> bool:
    """Whether Intel's extension for GPUs is installed, in the release for this PyTorch."""
    try:
        version = importlib.metadata.version(_IPEX)
    except importlib.metadata.PackageNotFoundError:
        return False
    return version.split(".")[:2] == torch.__version__.split(".")[:2] and "xpu" in version


class XcclCollectives(ProcessGroupCollectives):
    """XCCL, beside gloo for objects and tensors on the host."""

    host_process_group = "gloo"
