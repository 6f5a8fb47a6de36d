"""The host's own processor as a device."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
from torchport.errors import UnsupportedOperationError
from torchport.plugin import Backend, Capabilities, Topology

from torchport_cpu.cores import THREADS, allowed_cores, share_of_cores, thread_limit

_CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class CpuBackend(Backend):
    """The host's own processor: always one device, whose memory is the host's.

    PyTorch does not count the bytes of tensors on the CPU, so the memory figures are those of the whole
    process (its resident set size), of which tensors are the largest part in training.
    """

    def device(self, local_rank: int) -> torch.device:
        """Return the one CPU device; all processes of a machine share it."""
        return _CPU

    def capabilities(self) -> Capabilities:
        """Declare autocast to both 16-bit formats, loss scaling, process groups and compilation."""
        return Capabilities(
            autocast=frozenset({"bfloat16", "float16"}),
            grad_scaler=True,
            distributed=True,
            host_memory=True,
            memory_stats=True,
            compile=True,
        )

    def count(self) -> int:
        """Return 1: the cores are not devices of their own."""
        return 1

    def synchronize(self, device: torch.device) -> None:
        """Return at once: work on the CPU is not queued."""

    # --- memory (bytes) ----------------------------------------------------------------------------------

    def memory_info(self, device: torch.device) -> tuple[int, int]:
        """Return the available and total memory of the host, in bytes."""
        import psutil  # takes longer than a backend to make

        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def memory_allocated(self, device: torch.device) -> int:
        """Return the resident set size of this process, in bytes."""
        import psutil

        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device: torch.device) -> int:
        """Return the largest resident set size of this process since the last reset, in bytes.

        On Linux this is `VmHWM` of `/proc/self/status`; elsewhere `getrusage`, which cannot be reset.
        """
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)

    def reset_peak_memory(self, device: torch.device) -> None:
        """Start measuring `max_memory_allocated` anew (5 written to `/proc/self/clear_refs`: `man 5 proc`).

        Raises:
            UnsupportedOperationError: where the operating system has no such file, or forbids writing to it.
        """
        try:
            _CLEAR_REFS.write_text("5")
        except OSError as error:
            raise UnsupportedOperationError(
                "the peak of this process's memory cannot be reset here",
                reason=f"{_CLEAR_REFS}: {error.strerror}",
            ) from error

    # --- random numbers ----------------------------------------------------------------------------------

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the CPU's default generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore what `rng_state` returned."""
        torch.set_rng_state(state)

    def seed(self, seed: int) -> None:
        """Seed the CPU's default generator, and no other."""
        torch.default_generator.manual_seed(seed)

    # --- cores -------------------------------------------------------------------------------------------

    def start_process(self, topology: Topology) -> None:
        """Give each of several processes of a machine as many threads, unless `OMP_NUM_THREADS` says how many."""
        limit = thread_limit(topology.local_world_size, os.environ)
        if topology.local_world_size > 1 and limit:
            torch.set_num_threads(int(limit[THREADS]))

    def bind_cpu(self, topology: Topology) -> None:
        """Bind this process to its own contiguous share of the cores, and use as many threads.

        The shares are cut from the cores that the process may use now. Where the operating system cannot bind
        processes, only the number of threads is set.
        """
        share = share_of_cores(allowed_cores(), topology.local_rank, topology.local_world_size)
        if hasattr(os, "sched_setaffinity"):
            self.bind_to_cores(share)
        torch.set_num_threads(len(share))
