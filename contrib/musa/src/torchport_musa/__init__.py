"""Torchport on Moore Threads' GPUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

RUNTIME = ("torch-musa",)
VISIBLE = "MUSA_VISIBLE_DEVICES"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer Moore Threads' GPUs, as `torch_musa` registers them with PyTorch."""
    yield BackendSpec(
        name="musa",
        factory="torchport_musa.backend:MusaBackend",
        probe="torchport_musa:probe",
        summary="Moore Threads GPUs",
        device_type="musa",
        priority=100,
        collectives="mccl",
        runtime=RUNTIME,
        visible_devices_env=VISIBLE,
        distributed_type="MULTI_MUSA",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer Moore Threads' MCCL, which comes with `torch_musa`."""
    yield CollectivesSpec(
        name="mccl",
        factory="torchport_musa.backend:McclCollectives",
        summary="Moore Threads' MCCL",
        device_types=("musa",),
        runtime=RUNTIME,
    )


def probe() -> Probe:
    """Count the devices that this process can see. Counting does not initialise the runtime."""
    try:
        importlib.import_module("torch_musa")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Probe(
            available=False, reason=f"torch_musa cannot be loaded: {reason}; it needs the MUSA toolkit"
        )
    import torch

    count = int(torch.get_device_module("musa").device_count())
    if count:
        return Probe(available=True, count=count)
    if VISIBLE in os.environ:
        reason = f"no device is visible with {VISIBLE}={os.environ[VISIBLE]!r}: unset it, or name one"
    else:
        reason = "no device answers: is there one, and is its driver installed? (mthreads-gmi)"
    return Probe(available=False, reason=reason)
