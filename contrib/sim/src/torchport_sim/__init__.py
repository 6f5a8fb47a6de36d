"""A simulated accelerator for Torchport: descriptors only; imports neither torch nor the device's runtime."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the simulated devices: not there until they are asked for, and then preferred to any other."""
    yield BackendSpec(
        name="sim",
        factory="torchport_sim.backend:SimBackend",
        probe="torchport_sim:probe",
        summary="simulated devices, as many as SIM_DEVICE_COUNT says",
        device_type="sim",
        priority=1000,
        collectives="simccl",
        runtime=("torch>=2.13",),
        visible_devices_env="SIM_VISIBLE_DEVICES",
        distributed_type="MULTI_SIM",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer the collectives that carry the devices' tensors."""
    yield CollectivesSpec(
        name="simccl",
        factory="torchport_sim.collectives:SimCollectives",
        probe="torchport_sim:probe",
        summary="collectives of simulated devices, over gloo",
        device_types=("sim",),
        runtime=("torch>=2.13",),
    )


def probe() -> Probe:
    """Say how many devices there are, or why there is none; importing the runtime only where some are asked for."""
    if not os.environ.get("SIM_DEVICE_COUNT"):
        reason = "SIM_DEVICE_COUNT is not set: export SIM_DEVICE_COUNT=4 simulates four devices"
        return Probe(available=False, reason=reason)
    import sim_runtime

    try:
        visible = sim_runtime.visible_devices()
        sim_runtime.load()
    except sim_runtime.DeviceError as error:
        return Probe(available=False, reason=str(error))
    details = {"memory of each": f"{sim_runtime.memory_limit()} bytes"}
    return Probe(available=True, count=len(visible), details=details)
