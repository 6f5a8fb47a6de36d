"""A device of torch_xla, whose work is recorded and run by the step: imported when it is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torchport.errors import LaunchError, UnsupportedOperationError
from torchport.ops.pytree import recursively_apply
from torchport.plugin import Backend, BackendSpec, Capabilities, Topology

from torchport_tpu.config import XlaPlugin

_STATE_BYTES = 8


class XlaBackend(Backend):
    """The device that `PJRT_DEVICE` names, by default a TPU.

    Operations are recorded, and compiled and run together at the end of a step, or when a value is looked at. A
    prepared loader ends the step before each batch, `accumulate` and the optimizer's step do too.

    Attributes:
        batch_sharding: How batches are spread over devices; set by a strategy that spreads them.
    """

    config: XlaPlugin
    batch_sharding: Any = None

    def __init__(self, spec: BackendSpec, config: XlaPlugin | None = None) -> None:
        super().__init__(spec, config or XlaPlugin())

    def start_process(self, topology: Topology) -> None:
        """Choose the runtime's settings before it starts, and its part of the chips for this process.

        Raises:
            LaunchError: if the runtime numbers the processes in another way than the launcher.
        """
        os.environ.setdefault("PJRT_DEVICE", "TPU")
        if self.config.downcast_bf16:
            os.environ["XLA_DOWNCAST_BF16"] = "1"
        # A moved model keeps its parameters, so that optimizers made before, and tied weights, go on with them.
        torch.__future__.set_swap_module_params_on_conversion(True)
        if topology.local_world_size > 1 and "PJRT_LOCAL_PROCESS_RANK" not in os.environ:
            _join(topology)

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this process; with virtual devices, the one that stands for all."""
        device: torch.device = torch_xla.device()
        return device

    def capabilities(self) -> Capabilities:
        """Declare bf16 autocast, compilation, virtual devices and, except on PJRT's CPU, several processes."""
        return Capabilities(
            autocast=frozenset({"bfloat16"}),
            distributed=_device_type() != "CPU",
            compile=True,
            features=frozenset({"spmd"}),
        )

    def count(self) -> int:
        """Return the number of devices of the runtime that this process can see."""
        return int(xr.addressable_runtime_device_count())

    def synchronize(self, device: torch.device) -> None:
        """Run what is recorded, and wait for it; random numbers go on as if it had not been called."""
        state = self.rng_state(device)
        torch_xla.sync()
        xm.wait_device_ops()
        self.set_rng_state(state, device)

    # --- memory (bytes) ----------------------------------------------------------------------------------

    def memory_info(self, device: torch.device) -> tuple[int, int]:
        """Return the free and total memory of `device`, in bytes.

        Raises:
            UnsupportedOperationError: on a device whose memory the runtime does not report.
        """
        info = self._memory_of(device)
        return int(info["bytes_limit"]) - int(info["bytes_used"]), int(info["bytes_limit"])

    def memory_allocated(self, device: torch.device) -> int:
        """Return the bytes in use on `device`, also those of compiled programs."""
        return int(self._memory_of(device)["bytes_used"])

    def max_memory_allocated(self, device: torch.device) -> int:
        """Return the most bytes that have been in use on `device` since the runtime started: it cannot be reset."""
        return int(self._memory_of(device)["peak_bytes_used"])

    def _memory_of(self, device: torch.device) -> Any:
        try:
            return xm.get_memory_info(device)
        except RuntimeError as error:
            raise UnsupportedOperationError(
                f"backend {self.spec.name!r} does not report its memory on {_device_type()}",
                reason=str(error).splitlines()[0],
            ) from error

    # --- random numbers ----------------------------------------------------------------------------------

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the device's generator, a 64-bit number, as its eight bytes.

        The runtime draws from this number within a step, and begins each step from another one that it does not
        show: it is set to the same here, so that the run that goes on and one that restores the state agree.
        """
        state = int(xm.get_rng_state(str(device))) % 2**64
        xm.set_rng_state(state, str(device))
        return torch.frombuffer(bytearray(state.to_bytes(_STATE_BYTES, "little")), dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore what `rng_state` returned."""
        xm.set_rng_state(int.from_bytes(bytes(state.tolist()), "little"), str(device))

    def seed(self, seed: int) -> None:
        """Seed the device's generator."""
        xm.set_rng_state(seed % 2**64)

    # --- life cycle --------------------------------------------------------------------------------------

    def compile_backend(self) -> str:
        """Return the compiler of `torch.compile` for torch_xla."""
        return "openxla"

    def read_ahead(self, device: torch.device) -> Callable[[Iterator[Any]], Iterator[Any]]:
        """Let torch_xla's parallel loader read ahead and move batches."""
        from torchport_tpu.feed import feed

        return lambda batches: feed(batches, device, self.batch_sharding)

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        """Step, and run the recorded step; gradients of several processes are exchanged by the strategy."""
        result = super().optimizer_step(optimizer, closure)
        torch_xla.sync()
        return result

    def step_boundary(self) -> None:
        """Run what has been recorded."""
        torch_xla.sync()

    def save(self, value: Any, path: Path) -> None:
        """Write `value` with its tensors on the host, as `xm.save` does; tuples stay tuples."""
        recorded: list[torch.Tensor] = []
        recursively_apply(recorded.append, value)
        xm.unlazy([tensor for tensor in recorded if tensor.device.type == self.spec.device_type])
        torch.save(recursively_apply(torch.Tensor.cpu, value), path)


def _device_type() -> str:
    return os.environ.get("PJRT_DEVICE", "TPU").upper()


def _join(topology: Topology) -> None:
    """Take this process's part of the machine's chips, as torch_xla does under torchrun."""
    from torch_xla._internal import pjrt

    pjrt.initialize_multiprocess(topology.local_rank, topology.local_world_size)
    if xr.world_size() != topology.world_size or xr.global_ordinal() != topology.rank:
        raise LaunchError(
            f"rank {topology.rank} of {topology.world_size} is number {xr.global_ordinal()} of {xr.world_size()}"
            " to torch_xla",
            found=f"processes started by: {topology.source}",
            hint="torchport launch --launcher xla, one process for each device",
        )
