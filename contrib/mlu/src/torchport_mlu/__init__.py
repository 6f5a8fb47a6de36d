"""Torchport on Cambricon's MLUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

RUNTIME = ("torch-mlu",)
VISIBLE = "MLU_VISIBLE_DEVICES"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer Cambricon's MLUs, as `torch_mlu` registers them with PyTorch."""
    yield BackendSpec(
        name="mlu",
        factory="torchport_mlu.backend:MluBackend",
        probe="torchport_mlu:probe",
        summary="Cambricon MLUs",
        device_type="mlu",
        priority=100,
        collectives="cncl",
        runtime=RUNTIME,
        visible_devices_env=VISIBLE,
        distributed_type="MULTI_MLU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer Cambricon's CNCL, which comes with `torch_mlu`."""
    yield CollectivesSpec(
        name="cncl",
        factory="torchport_mlu.backend:CnclCollectives",
        summary="Cambricon's CNCL",
        device_types=("mlu",),
        runtime=RUNTIME,
    )


def probe() -> Probe:
    """Count the devices that this process can see. Counting does not initialise the runtime."""
    try:
        importlib.import_module("torch_mlu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Probe(
            available=False, reason=f"torch_mlu cannot be loaded: {reason}; it needs the Neuware SDK"
        )
    import torch

    count = int(torch.get_device_module("mlu").device_count())
    if count:
        return Probe(available=True, count=count)
    if VISIBLE in os.environ:
        reason = f"no device is visible with {VISIBLE}={os.environ[VISIBLE]!r}: unset it, or name one"
    else:
        reason = "no device answers: is there one, and is its driver installed? (cnmon)"
    return Probe(available=False, reason=reason)
