"""A TPU through torch_tpu, whose device PyTorch knows as `tpu`: imported when it is probed or chosen."""

from __future__ import annotations

import os
from typing import Any

import torch
from torchport.errors import LaunchError
from torchport.plugin import Backend, Capabilities, Probe, ProcessGroupCollectives, Topology

from torchport_tpu import chips

ADDRESSES = "TORCH_TPU_SLICEBUILDER_ADDRESSES"
"""Variable that connects the processes of a job; torch_tpu wants it set before they start."""


def probe() -> Probe:
    """Say whether torch_tpu has registered a device with PyTorch. Asks `torch.accelerator`, as torch_tpu demands."""
    names = chips.attached()
    if not names:
        return Probe(available=False, reason=chips.NO_CHIP)
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != "tpu":
        return Probe(
            available=False,
            reason=f"{names[0]} is there, and PyTorch's accelerator is {found}: torch_tpu has not registered it"
            " (is TORCH_DEVICE_BACKEND_AUTOLOAD=0 set, or /dev/vfio not readable?)",
        )
    count = torch.accelerator.device_count()
    return Probe(available=count > 0, count=count, details={"chips": ", ".join(sorted(set(names)))})


class TpuBackend(Backend):
    """A TPU that runs operations as they come; `torch.compile` makes programs of them.

    Each process has one device. What PyTorch's `torch.accelerator` offers is asked there: torch_tpu keeps its own
    functions of these names for PyTorch.
    """

    def start_process(self, topology: Topology) -> None:
        """Check that the launcher has connected the processes.

        Raises:
            LaunchError: if it has not.
        """
        if topology.world_size > 1 and not os.environ.get(ADDRESSES):
            raise LaunchError(
                f"{topology.world_size} processes on TPUs need {ADDRESSES}",
                found=f"processes started by: {topology.source}",
                hint="torchport launch --launcher xla, or torch.tpu.distributed.set_tpu_launch_env() before they start",
            )

    def device(self, local_rank: int) -> torch.device:
        """Return the device that torch_tpu has bound to this process."""
        return torch.device("tpu", torch.accelerator.current_device_index())

    def capabilities(self) -> Capabilities:
        """Declare bf16 autocast, process groups and compilation; no streams, whose contexts do nothing yet."""
        return Capabilities(autocast=frozenset({"bfloat16"}), distributed=True, compile=True)

    def count(self) -> int:
        """Return the number of devices of this machine."""
        return torch.accelerator.device_count()

    def synchronize(self, device: torch.device) -> None:
        """Wait until all work queued on `device` is done."""
        torch.accelerator.synchronize(device)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the device's default generator."""
        state: torch.Tensor = self._generator(device).get_state()
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore what `rng_state` returned."""
        self._generator(device).set_state(state)

    def _generator(self, device: torch.device) -> Any:
        return self.module.default_generators[device.index or 0]

    def compile_backend(self) -> str:
        """Return torch_tpu's compiler."""
        return "tpu"


class TpuCollectives(ProcessGroupCollectives):
    """The process group `tpu_dist` for tensors of the device, and gloo beside it for the host's."""

    host_process_group = "gloo"
