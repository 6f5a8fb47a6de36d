"""Torchport on TPUs: descriptors only; imports neither torch nor a runtime. Public names come when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchport.plugin import (
    BackendSpec,
    CollectivesSpec,
    LauncherSpec,
    Requirements,
    StrategySpec,
    hookimpl,
    lazy_exports,
    missing_runtime,
)

if TYPE_CHECKING:
    from torchport_tpu.config import XlaPlugin
    from torchport_tpu.spmd_config import SpmdPlugin

    install_xla: Callable[..., None]

TORCH_TPU = ("torch-tpu>=0.2",)
TORCH_XLA = ("torch-xla>=2.6",)
SPMD = "spmd"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer TPUs, and the devices of torch_xla.

    `tpu` is a TPU through `torch_tpu`, or through `torch_xla` where that alone is installed. `xla` is `torch_xla` on
    whatever device `PJRT_DEVICE` names.
    """
    xla = BackendSpec(
        name="xla",
        factory="torchport_tpu.backend:XlaBackend",
        probe="torchport_tpu.chips:probe_xla",
        config="torchport_tpu.config:XlaPlugin",
        summary="torch_xla on the device of PJRT_DEVICE (TPU, CPU, …)",
        device_type="xla",
        priority=90,
        collectives="xla",
        runtime=TORCH_XLA,
        visible_devices_env="TPU_VISIBLE_CHIPS",
        distributed_type="XLA",
    )
    yield xla
    over_xla = bool(missing_runtime(TORCH_TPU)) and not missing_runtime(TORCH_XLA)
    yield replace(
        xla,
        name="tpu",
        probe="torchport_tpu.chips:probe_tpu_over_xla" if over_xla else "torchport_tpu.native:probe",
        factory=xla.factory if over_xla else "torchport_tpu.native:TpuBackend",
        config=xla.config if over_xla else "",
        summary=f"TPU through {'torch_xla' if over_xla else 'torch_tpu'}",
        device_type="xla" if over_xla else "tpu",
        priority=100,
        collectives="xla" if over_xla else "tpu_dist",
        runtime=TORCH_XLA if over_xla else TORCH_TPU,
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer the collectives of both runtimes."""
    yield CollectivesSpec(
        name="xla",
        factory="torchport_tpu.collectives:XlaCollectives",
        summary="torch_xla's collectives for tensors, gloo for objects",
        device_types=("xla",),
        runtime=TORCH_XLA,
    )
    yield CollectivesSpec(
        name="tpu_dist",
        factory="torchport_tpu.native:TpuCollectives",
        summary="torch_tpu's collectives for tensors, gloo for objects",
        device_types=("tpu",),
        runtime=TORCH_TPU,
    )


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer one program over all devices, whose tensors the compiler spreads over them."""
    yield StrategySpec(
        name=SPMD,
        aliases=("xla_spmd",),
        factory="torchport_tpu.spmd:SpmdStrategy",
        start_process="torchport_tpu.spmd:start_process",
        config="torchport_tpu.spmd_config:SpmdPlugin",
        summary="one process over all devices of a machine: the XLA compiler spreads batches and parameters",
        runtime=TORCH_XLA,
        needs=Requirements(features=frozenset({SPMD})),
        distributed_type="XLA",
    )


@hookimpl
def torchport_launchers() -> Iterable[LauncherSpec]:
    """Offer one process for each device of this machine of a pod."""
    yield LauncherSpec(
        name="xla",
        aliases=("tpu",),
        factory="torchport_tpu.launcher:XlaLauncher",
        summary="torch_xla.launch, or torch_tpu's environment, on each machine of a pod",
        features=frozenset({"machines"}),
    )


_EXPORTS = {
    "SpmdPlugin": ".spmd_config",
    "XlaPlugin": ".config",
    "install_xla": ".install",
}

__all__ = ["SpmdPlugin", "XlaPlugin", "install_xla"]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS)
