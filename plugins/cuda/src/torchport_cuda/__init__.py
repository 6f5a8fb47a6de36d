"""Torchport on NVIDIA and AMD GPUs: descriptors only; imports neither torch nor NVML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchport.plugin import BackendSpec, CollectivesSpec, hookimpl


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the GPUs of a PyTorch built with CUDA, or with ROCm, which goes by the same name there."""
    yield BackendSpec(
        name="cuda",
        aliases=("rocm",),
        factory="torchport_cuda.backend:CudaBackend",
        probe="torchport_cuda.probe:probe",
        summary="NVIDIA GPUs (CUDA) and AMD GPUs (ROCm)",
        config="torchport_cuda.config:CudaSettings",
        device_type="cuda",
        priority=100,
        collectives="nccl",
        visible_devices_env="CUDA_VISIBLE_DEVICES",
        distributed_type="MULTI_GPU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer NCCL, or RCCL on ROCm, which goes by the same name in PyTorch."""
    yield CollectivesSpec(
        name="nccl",
        aliases=("rccl",),
        factory="torchport_cuda.backend:NcclCollectives",
        probe="torchport_cuda.probe:probe_nccl",
        summary="NCCL on NVIDIA GPUs, RCCL on AMD GPUs",
        device_types=("cuda",),
    )


@hookimpl
def torchport_plan_resolved(plan: Any) -> Iterable[str]:
    """Tell the operator which transfers are switched off on cards that do not have them."""
    if plan["backend"].name != "cuda" or plan.topology.world_size == 1:
        return ()
    from torchport_cuda.gpus import consumer_card, unset_switches

    missing = " and ".join(f"{name}=1" for name in unset_switches())
    card = consumer_card() if missing else ""
    return [f"{missing}: {card} has no peer-to-peer or InfiniBand transfers (set 0 to try)"] if card else ()
