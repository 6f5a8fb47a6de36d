"""Torchport on Intel GPUs: descriptors and probes; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl, torch_build

_VISIBLE = "ZE_AFFINITY_MASK"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the Intel GPUs of a PyTorch that was built with XPU."""
    yield BackendSpec(
        name="xpu",
        factory="torchport_xpu.backend:XpuBackend",
        probe="torchport_xpu:probe",
        summary="Intel GPUs",
        device_type="xpu",
        priority=100,
        collectives="xccl",
        visible_devices_env=_VISIBLE,
        distributed_type="MULTI_XPU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer oneCCL as it comes with PyTorch."""
    yield CollectivesSpec(
        name="xccl",
        factory="torchport_xpu.backend:XcclCollectives",
        probe="torchport_xpu:probe_xccl",
        summary="oneCCL on Intel GPUs",
        device_types=("xpu",),
    )


def probe() -> Probe:
    """Count the GPUs that this process can see; importing torch only where it was built for them."""
    if reason := _not_built():
        return Probe(available=False, reason=reason)
    import torch

    count = torch.xpu.device_count()
    if count:
        return Probe(available=True, count=count)
    if _VISIBLE in os.environ:
        reason = f"no GPU is visible with {_VISIBLE}={os.environ[_VISIBLE]!r}: unset it, or name one"
    else:
        reason = "no Intel GPU answers: is there one, and is its driver installed? (xpu-smi discovery)"
    return Probe(available=False, reason=reason)


def probe_xccl() -> Probe:
    """Say whether PyTorch was built with XCCL, as releases from 2.7 on are."""
    if reason := _not_built():
        return Probe(available=False, reason=reason)
    import torch.distributed as dist

    if getattr(dist, "is_xccl_available", bool)():
        return Probe(available=True)
    version = torch_build()["__version__"]
    return Probe(available=False, reason=f"PyTorch {version} has no XCCL: pip install --upgrade torch (2.7)")


def _not_built() -> str:
    build = torch_build()
    if build.get("xpu"):
        return ""
    return (
        f"PyTorch {build.get('__version__', '')} is not built for Intel GPUs: pip uninstall torch, then install the"
        " XPU build (https://pytorch.org/docs/stable/notes/get_start_xpu.html)"
    )
