"""A NeuronCore as a device of torch_xla: imported when it is chosen."""

from __future__ import annotations

import importlib
import os

from torchport.plugin import BackendSpec, Topology
from torchport_tpu.backend import XlaBackend
from torchport_tpu.config import XlaPlugin


class NeuronBackend(XlaBackend):
    """A NeuronCore. The parallel loader, the ends of steps, saving and random numbers are those of torch_xla."""

    def __init__(self, spec: BackendSpec, config: XlaPlugin | None = None) -> None:
        super().__init__(spec, config)
        importlib.import_module("torch_neuronx")  # sets the runtime's variables and registers its operations

    def start_process(self, topology: Topology) -> None:
        """Name the device to PJRT, and take this process's core as torch_xla does under torchrun."""
        os.environ.setdefault("PJRT_DEVICE", "NEURON")
        super().start_process(topology)
