"""Gaudi as a device through Habana's bridge to PyTorch, and HCCL: imported when they are chosen."""

from __future__ import annotations

import functools
import importlib
import os
import re
from typing import Any

import torch
from torchport.errors import ConfigurationError
from torchport.plugin import (
    Backend,
    BackendSpec,
    Capabilities,
    PrepareRequest,
    ProcessGroupCollectives,
    Topology,
)

from torchport_hpu.config import LAZY


class HpuBackend(Backend):
    """Intel Gaudi. Each process has one processor, which it knows by the index 0.

    In lazy mode operations are recorded, and run as a graph at `mark_step`: before and after each optimizer step.
    """

    def __init__(self, spec: BackendSpec, config: Any = None) -> None:
        super().__init__(spec, config)
        asked = getattr(config, "lazy_mode", "")
        if asked and os.environ.setdefault(LAZY, asked) != asked:
            raise ConfigurationError(
                f"HpuSettings(lazy_mode={asked!r}) differs from the environment",
                found=f"{LAZY}={os.environ[LAZY]}",
                hint=f"export {LAZY}={asked}, or torchport launch --hpu-lazy-mode {asked}",
            )
        self._core = importlib.import_module("habana_frameworks.torch.core")
        self._hpu = importlib.import_module("habana_frameworks.torch.hpu")
        self.lazy = _is_lazy()

    def device(self, local_rank: int) -> torch.device:
        """Return the processor of this process; the bridge maps it to the local rank."""
        self.device_index(local_rank)
        return torch.device("hpu", self._hpu.current_device())

    def capabilities(self) -> Capabilities:
        """Declare bfloat16, from the second generation on float16 and FP8, and what the mode of execution allows."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        newer = _generation(self._hpu.get_device_name()) >= 2
        features = {"fp8": newer, "hpu_graphs": self.lazy}
        return Capabilities(
            autocast=frozenset({"bfloat16", "float16"} if newer else {"bfloat16"}),
            grad_scaler=newer,
            pinned_memory=True,
            memory_stats=True,
            compile=not self.lazy,
            features=frozenset(name for name, there in features.items() if there),
        )

    def synchronize(self, device: torch.device) -> None:
        """Wait until all work queued on the processor is done."""
        self._hpu.synchronize()

    def count(self) -> int:
        """Return the number of processors that this process could take."""
        return int(self._hpu.device_count())

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the processor's generator."""
        state: torch.Tensor = self._hpu.random.get_rng_state()
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore what `rng_state` returned."""
        self._hpu.random.set_rng_state(state)

    def seed(self, seed: int) -> None:
        """Seed the processor's generator."""
        self._hpu.random.manual_seed_all(seed)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` in host memory that is page-locked for Gaudi."""
        return tensor.pin_memory("hpu")

    def compile_backend(self) -> str:
        """Return the name of Habana's compiler."""
        return "hpu_backend"

    # --- life cycle --------------------------------------------------------------------------------------

    def start_process(self, topology: Topology) -> None:
        """Tell the bridge the place of this process, by which it takes its processor."""
        if topology.world_size > 1:
            hccl = importlib.import_module("habana_frameworks.torch.distributed.hccl")
            hccl.initialize_distributed_hpu(
                world_size=topology.world_size, rank=topology.rank, local_rank=topology.local_rank
            )

    def adapt(self, request: PrepareRequest) -> None:
        """Capture models for evaluation in HPU graphs, if the settings ask for it.

        Raises:
            ConfigurationError: if they do in eager mode.
        """
        if not getattr(self.config, "graphs", False):
            return
        if not self.lazy:
            raise ConfigurationError("HPU graphs need the lazy mode", hint=f"export {LAZY}=1")
        if request.evaluation_only:
            for model in request.models:
                self._hpu.wrap_in_hpu_graph(model)

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        """Run the recorded backward as a graph of its own, then step."""
        self.step_boundary()
        return super().optimizer_step(optimizer, closure)

    def step_boundary(self) -> None:
        """Run what has been recorded."""
        if self.lazy:
            self._core.mark_step()


def _is_lazy() -> bool:
    """Ask the bridge: which mode is the default depends on its release."""
    if LAZY in os.environ:
        return os.environ[LAZY] == "1"
    return bool(importlib.import_module("habana_frameworks.torch.utils.internal").is_lazy())


def _generation(name: str) -> int:
    """Return the number in names such as `GAUDI2`; the first generation has none."""
    found = re.search(r"GAUDI\s*(\d+)", name.upper())
    return int(found[1]) if found else 1


class HcclCollectives(ProcessGroupCollectives):
    """HCCL. Objects and barriers go over it too."""

    def register(self) -> None:
        """Import what makes HCCL known to PyTorch."""
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
