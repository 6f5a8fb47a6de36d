"""Torchport on Tecorigin's SDAA accelerators: descriptors and the probe; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl, probe_module

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
    return probe_module("torch_sdaa", "sdaa", visible=VISIBLE, needs="the SDAA driver", tool="teco-smi")
