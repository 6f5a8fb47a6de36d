"""Torchport on Tecorigin's SDAA accelerators: descriptors and the probe; imports no torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

RUNTIME = ("torch-sdaa",)
VISIBLE = "SDAA_VISIBLE_DEVICES"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer Tecorigin's SDAA accelerators, as `torch_sdaa` registers them with PyTorch."""
    yield BackendSpec(
        name="sdaa",
        factory="torchport_sdaa.backend:SdaaBackend",
        probe="torchport_sdaa:probe",
        summary="Tecorigin SDAA accelerators",
        device_type="sdaa",
        priority=100,
        collectives="tccl",
        runtime=RUNTIME,
        visible_devices_env=VISIBLE,
        distributed_type="MULTI_SDAA",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer Tecorigin's TCCL, which comes with `torch_sdaa`."""
    yield CollectivesSpec(
        name="tccl",
        factory="torchport_sdaa.backend:TcclCollectives",
        summary="Tecorigin's TCCL",
        device_types=("sdaa",),
        runtime=RUNTIME,
    )


def probe() -> Probe:
    """Count the devices that this process can see. Counting does not initialise the runtime."""
    try:
        importlib.import_module("torch_sdaa")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Probe(
            available=False, reason=f"torch_sdaa cannot be loaded: {reason}; it needs the SDAA driver"
        )
    import torch

    count = int(torch.get_device_module("sdaa").device_count())
    if count:
        return Probe(available=True, count=count)
    if VISIBLE in os.environ:
        reason = f"no device is visible with {VISIBLE}={os.environ[VISIBLE]!r}: unset it, or name one"
    else:
        reason = "no device answers: is there one, and is its driver installed? (teco-smi)"
    return Probe(available=False, reason=reason)
