"""All levels on Gaudi, where it is there; elsewhere the package level alone."""

from __future__ import annotations

from torchport.testing import BackendConformance, CollectivesConformance
from torchport_hpu import probe

THERE = probe().available


class TestBackend(BackendConformance):
    backend = "hpu"
    levels = () if THERE else ("L0",)
    verified_on = "hardware" if THERE else "stub"
    heavy_modules = ("habana_frameworks",)


SEVERAL = probe().count > 1


class TestCollectives(CollectivesConformance):
    collectives = "hccl"
    backend = "hpu"
    levels = () if SEVERAL else ("L0",)
    verified_on = "hardware" if SEVERAL else "stub"
