"""The conformance kit on four simulated devices, in jobs of their own: this process has none."""

from __future__ import annotations

import pytest
from torchport.testing import BackendConformance, CollectivesConformance


class TestDevice(BackendConformance):
    backend = "sim"
    levels = ("L0", "L1")
    verified_on = "simulated"
    environ = {"SIM_DEVICE_COUNT": "4"}  # noqa: RUF012
    heavy_modules = ("sim_runtime",)


@pytest.mark.long
class TestBackend(BackendConformance):
    backend = "sim"
    levels = ("L2", "L3", "L4")  # test_devices.py trains and saves on these devices, too
    verified_on = "simulated"
    environ = {"SIM_DEVICE_COUNT": "4"}  # noqa: RUF012
    heavy_modules = ("sim_runtime",)


class TestCollectives(CollectivesConformance):
    collectives = "simccl"
    backend = "sim"
    levels = ("L0",)  # the backend's own level L2 runs over it
    verified_on = "simulated"
    environ = {"SIM_DEVICE_COUNT": "4"}  # noqa: RUF012
