"""Torchport on Huawei's Ascend NPUs: descriptors and the probe; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl, probe_module

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
    return probe_module(
        "torch_npu", "npu", visible=VISIBLE, needs="CANN (source its set_env.sh)", tool="npu-smi info"
    )
