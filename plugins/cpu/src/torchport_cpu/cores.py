"""Shares of this machine's processor cores. Imports no torch: the launchers need it too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

THREADS = "OMP_NUM_THREADS"
"""The variable by which OpenMP, and with it PyTorch, is told its number of threads."""


def allowed_cores() -> list[int]:
    """Return the cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_of_cores(cores: Sequence[int], local_rank: int, local_world_size: int) -> list[int]:
    """Return the contiguous share of `cores` that belongs to one of several processes.

    Shares differ by at most one core. With fewer cores than processes, processes take turns on single cores.
    """
    if len(cores) < local_world_size:
        return [cores[local_rank % len(cores)]]
    start = len(cores) * local_rank // local_world_size
    end = len(cores) * (local_rank + 1) // local_world_size
    return list(cores[start:end])


def thread_limit(local_world_size: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return `OMP_NUM_THREADS` for one of several processes; nothing where it is set already."""
    if environ.get(THREADS):
        return {}
    return {THREADS: str(max(1, len(allowed_cores()) // local_world_size))}
