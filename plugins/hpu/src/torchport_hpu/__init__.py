"""Torchport on Intel Gaudi: descriptors and probe; imports neither torch nor Habana's packages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

_VISIBLE = "HABANA_VISIBLE_MODULES"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the Gaudi processors of this machine."""
    yield BackendSpec(
        name="hpu",
        aliases=("gaudi",),
        factory="torchport_hpu.backend:HpuBackend",
        probe="torchport_hpu:probe",
        summary="Intel Gaudi",
        config="torchport_hpu.config:HpuSettings",
        device_type="hpu",
        priority=100,
        collectives="hccl",
        visible_devices_env=_VISIBLE,
        distributed_type="MULTI_HPU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer Habana's collectives."""
    yield CollectivesSpec(
        name="hccl",
        factory="torchport_hpu.backend:HcclCollectives",
        probe="torchport_hpu:probe_hccl",
        summary="Habana's collectives on Intel Gaudi",
        device_types=("hpu",),
    )


def probe() -> Probe:
    """Count the processors; importing torch and Habana's packages only where they are installed."""
    if not _installed():
        return _NOT_INSTALLED
    import habana_frameworks.torch.hpu as hthpu

    count = hthpu.device_count()
    if count:
        return Probe(available=True, count=count)
    shown = f" with {_VISIBLE}={os.environ[_VISIBLE]!r}" if _VISIBLE in os.environ else ""
    return Probe(
        available=False, reason=f"no Gaudi answers{shown}: is its driver loaded, or is it in use? (hl-smi)"
    )


def probe_hccl() -> Probe:
    """Say whether Habana's packages are installed: the collectives come with them."""
    return Probe(available=True) if _installed() else _NOT_INSTALLED


def _installed() -> bool:
    return importlib.util.find_spec("habana_frameworks") is not None


_NOT_INSTALLED = Probe(
    available=False,
    reason="habana-torch-plugin is not installed; it is not on PyPI, but comes with Intel Gaudi's software:"
    " https://docs.habana.ai/en/latest/Installation_Guide",
)
