"""Backends over the host's own processor, each wrong in one way."""

from __future__ import annotations

import contextlib
import os
import random

import torch
from torchport.plugin import Capabilities, Probe
from torchport_cpu.backend import CpuBackend

_initialised: list[int] = []
_highest = 0


def probe() -> Probe:
    return Probe(available=True, count=1)


def initialise() -> Probe:
    _initialised.append(os.getpid())
    return Probe(available=True, count=1)


def raises() -> Probe:
    raise OSError("the driver is not loaded")


def without_reason() -> Probe:
    return Probe(available=False)


class SteadyBackend(CpuBackend):
    """Right."""


class Incomplete(torch.nn.Module):
    """No backend at all."""


class OffByOne(CpuBackend):
    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu", local_rank + 1)


class WrongType(CpuBackend):
    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


class MiscountedDevices(CpuBackend):
    def count(self) -> int:
        return 2


class InitialisedByProbe(CpuBackend):
    """Behaves as runtimes do that were initialised before a fork."""

    def device(self, local_rank: int) -> torch.device:
        if _initialised and os.getpid() not in _initialised:
            raise RuntimeError("cannot initialise the runtime again in a forked process")
        return super().device(local_rank)


class NeverFreed(CpuBackend):
    def memory_allocated(self, device: torch.device) -> int:
        global _highest
        _highest = max(_highest, super().memory_allocated(device))
        return _highest


class NotCounted(CpuBackend):
    def memory_allocated(self, device: torch.device) -> int:
        return 2**20


class PeakNeverResets(CpuBackend):
    def reset_peak_memory(self, device: torch.device) -> None:
        pass


class PeakIsNow(CpuBackend):
    def max_memory_allocated(self, device: torch.device) -> int:
        return self.memory_allocated(device)


class FreeAboveTotal(CpuBackend):
    def memory_info(self, device: torch.device) -> tuple[int, int]:
        free, total = super().memory_info(device)
        return total, free


class StateNotRestored(CpuBackend):
    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        pass


class StateOfNobody(CpuBackend):
    def rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.zeros_like(super().rng_state(device))

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        torch.manual_seed(0)


class SeedIgnored(CpuBackend):
    def seed(self, seed: int) -> None:
        super().seed(random.SystemRandom().randrange(2**31))


class AutocastStaysFloat32(CpuBackend):
    def autocast(self, dtype: torch.dtype, **options):
        return contextlib.nullcontext()


class AutocastToTheOther(CpuBackend):
    def autocast(self, dtype: torch.dtype, **options):
        return super().autocast(torch.bfloat16, **options)


class AutocastStaysOn(CpuBackend):
    def autocast(self, dtype: torch.dtype, **options):
        return super().autocast(dtype)


class ScalerDisabled(CpuBackend):
    def grad_scaler(self, **options):
        return super().grad_scaler(enabled=False)


class _Reckless(torch.amp.GradScaler):
    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        return optimizer.step(*args, **kwargs)


class ScalerNeverSkips(CpuBackend):
    def grad_scaler(self, **options):
        return _Reckless("cpu", **options)


class PinnedInName(CpuBackend):
    def capabilities(self) -> Capabilities:
        return Capabilities(pinned_memory=True)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class StreamsInName(CpuBackend):
    def capabilities(self) -> Capabilities:
        return Capabilities(streams=True)

    def stream(self, device):
        return None


class CopiesOnHost(CpuBackend):
    """Declares host memory for a device whose tensors are elsewhere."""

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


class StepsTwice(CpuBackend):
    def optimizer_step(self, optimizer, closure=None):
        super().optimizer_step(optimizer, closure)
        return super().optimizer_step(optimizer, closure)


class DropsLastBatch(CpuBackend):
    def wrap_dataloader(self, loader, device):
        return list(loader)[:-1]


class SavesLess(CpuBackend):
    def save(self, value, path) -> None:
        super().save({key: item for key, item in value.items() if isinstance(item, torch.Tensor)}, path)
