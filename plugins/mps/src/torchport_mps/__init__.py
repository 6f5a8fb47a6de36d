"""Torchport on Apple GPUs: descriptor and probe; imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Iterable

from torchport.plugin import BackendSpec, Probe, hookimpl


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the GPU of an Apple silicon Mac."""
    yield BackendSpec(
        name="mps",
        factory="torchport_mps.backend:MpsBackend",
        probe="torchport_mps:probe",
        summary="Apple GPUs",
        config="torchport_mps.config:MpsSettings",
        device_type="mps",
        priority=100,
        single_process="a Mac has one Apple GPU, and no collectives (gloo, nccl) carry its tensors",
    )


def probe() -> Probe:
    """Say whether there is a GPU; importing torch only on macOS."""
    system, machine = platform.system(), platform.machine()
    if system != "Darwin" or machine != "arm64":
        return Probe(
            available=False, reason=f"Apple GPUs need macOS on Apple silicon; this is {system} on {machine}"
        )
    import torch

    if not torch.backends.mps.is_built():
        reason = f"PyTorch {torch.__version__} is built without MPS: pip install --force-reinstall torch"
        return Probe(available=False, reason=reason)
    if not torch.backends.mps.is_available():
        reason = f"MPS needs macOS 14 or newer for this PyTorch; this is {platform.mac_ver()[0]} (or no GPU is there)"
        return Probe(available=False, reason=reason)
    return Probe(available=True, count=1)
