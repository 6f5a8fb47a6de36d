"""Torchport on Moore Threads' GPUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl, probe_module

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
    return probe_module("torch_musa", "musa", visible=VISIBLE, needs="the MUSA toolkit", tool="mthreads-gmi")
