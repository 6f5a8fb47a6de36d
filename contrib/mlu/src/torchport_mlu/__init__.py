"""Torchport on Cambricon's MLUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl, probe_module

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
    return probe_module("torch_mlu", "mlu", visible=VISIBLE, needs="the Neuware SDK", tool="cnmon")
