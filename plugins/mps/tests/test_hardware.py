"""All levels on an Apple GPU, where it is there; elsewhere the package level alone."""

from __future__ import annotations

import torch
from torchport.testing import BackendConformance

THERE = torch.backends.mps.is_available()


class TestBackend(BackendConformance):
    backend = "mps"
    levels = () if THERE else ("L0",)
    verified_on = "hardware" if THERE else "stub"
