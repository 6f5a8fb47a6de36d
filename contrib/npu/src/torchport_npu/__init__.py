"""Torchport on Huawei's Ascend NPUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

RUNTIME = ("torch-npu",)
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer Huawei's Ascend NPUs, as `torch_npu` registers them with PyTorch."""
    yield BackendSpec(
        name="npu",
        factory="torchport_npu.backend:NpuBackend",
        probe="torchport_npu:probe",
        summary="Ascend NPUs",
        device_type="npu",
        priority=100,
        collectives="hccl-npu",
        runtime=RUNTIME,
        visible_devices_env=VISIBLE,
        distributed_type="MULTI_NPU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer Huawei's HCCL, which comes with `torch_npu`."""
    yield CollectivesSpec(
        name="hccl-npu",
        factory="torchport_npu.backend:HcclCollectives",
        summary="Huawei's HCCL",
        device_types=("npu",),
        runtime=RUNTIME,
    )


def probe() -> Probe:
    """Count the devices that this process can see. Counting does not initialise the runtime."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Probe(
            available=False,
            reason=f"torch_npu cannot be loaded: {reason}; it needs CANN (source its set_env.sh)",
        )
    import torch

    count = int(torch.get_device_module("npu").device_count())
    if count:
        return Probe(available=True, count=count)
    if VISIBLE in os.environ:
        reason = f"no device is visible with {VISIBLE}={os.environ[VISIBLE]!r}: unset it, or name one"
    else:
        reason = "no device answers: is there one, and is its driver installed? (npu-smi info)"
    return Probe(available=False, reason=reason)
