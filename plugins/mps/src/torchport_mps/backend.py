"""The Apple GPU as a device through `torch.mps`: imported when it is chosen."""

from __future__ import annotations

import functools
import os

import torch
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.plugin import Backend, Capabilities

from torchport_mps.config import FALLBACK

_MPS = torch.device("mps", 0)


class MpsBackend(Backend):
    """The one GPU of a Mac, which shares the memory of the host."""

    def device(self, local_rank: int) -> torch.device:
        """Return the GPU.

        Raises:
            ConfigurationError: if the fallback was asked for too late, after PyTorch was imported.
        """
        asked = getattr(self.config, "fallback", "")
        if asked and os.environ.get(FALLBACK, "0") != asked:
            raise ConfigurationError(
                f"MpsSettings(fallback={asked!r}) comes too late",
                reason=f"PyTorch reads {FALLBACK} when it is imported",
                hint=f"export {FALLBACK}={asked}, or torchport launch --mps-fallback {asked}",
            )
        return _MPS

    def capabilities(self) -> Capabilities:
        """Declare float16, bfloat16 from macOS 14 on, and loss scaling from PyTorch 2.8 on; no process groups."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return Capabilities(
            autocast=frozenset({"float16", "bfloat16"} if bfloat16 else {"float16"}),
            grad_scaler=_release() >= (2, 8),
            distributed=False,
            memory_stats=True,
        )

    def count(self) -> int:
        """Return 1."""
        return 1

    def synchronize(self, device: torch.device) -> None:
        """Wait until all work queued on the GPU is done."""
        torch.mps.synchronize()

    def memory_info(self, device: torch.device) -> tuple[int, int]:
        """Return the free and total memory that the system recommends this process to use on the GPU, in bytes."""
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.driver_allocated_memory()), total

    def memory_allocated(self, device: torch.device) -> int:
        """Return the bytes that tensors of this process occupy on the GPU now."""
        return torch.mps.current_allocated_memory()

    def max_memory_allocated(self, device: torch.device) -> int:
        """Refuse: PyTorch keeps no peak for Apple GPUs."""
        raise _no_peak()

    def reset_peak_memory(self, device: torch.device) -> None:
        """Refuse: PyTorch keeps no peak for Apple GPUs."""
        raise _no_peak()

    def seed(self, seed: int) -> None:
        """Seed the GPU's generator."""
        torch.mps.manual_seed(seed)


def _no_peak() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Apple GPUs do not tell the most memory that was in use",
        reason="torch.mps keeps no such figure",
        hint="memory_allocated, at the places that matter",
    )


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])
