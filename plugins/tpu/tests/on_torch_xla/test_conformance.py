"""The conformance kit on the real torch_xla, whose device is PJRT's CPU."""

from collections.abc import Mapping
from typing import ClassVar

from torchport.testing import BackendConformance, StrategyConformance

RUNTIME = "vendor runtime without device"


class TestXla(BackendConformance):
    backend = "xla"
    environ: ClassVar[Mapping[str, str]] = {"PJRT_DEVICE": "CPU"}
    verified_on = RUNTIME
    timeout = 240.0


class TestSpmd(StrategyConformance):
    strategy = "spmd"
    backend = "xla"
    precisions = ("no",)
    environ: ClassVar[Mapping[str, str]] = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    verified_on = RUNTIME
    timeout = 240.0
