"""Whether there are GPUs: imports torch only where it was built for them, and initialises nothing."""

from __future__ import annotations

import os
import sys
import warnings

from torchport.plugin import Probe, torch_build

from torchport_cuda.gpus import VISIBLE, visible_gpus

_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")  # NVIDIA, in WSL, Jetson; AMD
_HIDING = (VISIBLE, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def probe() -> Probe:
    """Count the GPUs that this process can see, through NVML where there is one."""
    build = torch_build()
    if reason := _not_built():
        return Probe(available=False, reason=reason)
    # Lets a script ask torch.cuda.is_available() before it forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    gpus = visible_gpus() if build["cuda"] else None
    count = len(gpus) if gpus is not None else _counted_by_torch() if _has_driver() else 0
    if count:
        names = ", ".join(sorted({gpu.name for gpu in gpus or ()}))
        return Probe(available=True, count=count, details={"devices": names} if names else {})
    hidden = " ".join(f"{name}={os.environ[name]!r}" for name in _HIDING if name in os.environ)
    if hidden:
        return Probe(available=False, reason=f"no GPU is visible with {hidden}: unset it, or name one")
    driver, tool = ("NVIDIA", "nvidia-smi") if build["cuda"] else ("AMD", "rocm-smi")
    reason = f"no {driver} GPU answers: is there one, and is its driver loaded? ({tool})"
    return Probe(available=False, reason=reason)


def probe_nccl() -> Probe:
    """Say whether PyTorch was built with NCCL, or RCCL."""
    if reason := _not_built():
        return Probe(available=False, reason=reason)
    import torch.distributed as dist

    if dist.is_available() and dist.is_nccl_available():
        return Probe(available=True)
    return Probe(available=False, reason="this PyTorch is built without NCCL, which runs on Linux only")


def _not_built() -> str:
    build = torch_build()
    if build.get("cuda") or build.get("hip"):
        return ""
    return (
        f"PyTorch {build.get('__version__', '')} is built for neither CUDA nor ROCm: pip uninstall torch, then"
        " pip install torch (Linux: CUDA); Windows, ROCm: https://pytorch.org/get-started/locally"
    )


def _has_driver() -> bool:
    """Whether a driver may be there: where none is, torch, which takes seconds to import, need not be asked."""
    from pathlib import Path

    return sys.platform != "linux" or any(Path(node).exists() for node in _NODES)


def _counted_by_torch() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where there is no driver: the reason says so
        return torch.cuda.device_count()
