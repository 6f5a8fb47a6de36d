"""All levels on Intel GPUs, where there are some; elsewhere the package level alone."""

from __future__ import annotations

import torch
from torchport.testing import BackendConformance, CollectivesConformance

THERE = torch.xpu.is_available()


class TestBackend(BackendConformance):
    backend = "xpu"
    levels = () if THERE else ("L0",)
    verified_on = "hardware" if THERE else "stub"
    heavy_modules = ("intel_extension_for_pytorch",)


SEVERAL = torch.xpu.device_count() > 1


class TestCollectives(CollectivesConformance):
    collectives = "xccl"
    backend = "xpu"
    levels = () if SEVERAL else ("L0",)
    verified_on = "hardware" if SEVERAL else "stub"
