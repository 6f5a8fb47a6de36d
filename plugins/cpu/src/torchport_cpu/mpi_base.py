"""The parts of an MPI process group that are the same for all operations."""

# Signatures follow PyTorch's C++ interface, of which its Python stubs are an outdated picture.
# mypy: disable-error-code="override,assignment,misc,call-arg"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchport.errors import OperationError

from torchport_cpu.mpi_engine import Engine
from torchport_cpu.mpi_types import Reduction, check_size, check_tensors, reduction
from torchport_cpu.mpi_work import JoinedWork, MpiWork, Part

BACKEND = "torchport_mpi"
"""Name of the backend in `torch.distributed`, where "mpi" is the one that PyTorch must be compiled with."""

Start = Callable[[], Part]
"""Issues a nonblocking MPI call."""
Tensors = Sequence[torch.Tensor]


class MpiGroup(dist.ProcessGroup):
    """A process group over an MPI communicator, without its operations.

    Args:
        engine: The MPI library of this process.
        communicator: An `MPI.Comm` of this group's own, freed by `shutdown`.
        label: Name of the group, for errors.
        timeout: How long an operation may wait for other processes.
    """

    def __init__(self, engine: Engine, communicator: Any, label: str, timeout: timedelta) -> None:
        super().__init__(communicator.Get_rank(), communicator.Get_size())
        self.engine, self.mpi, self.communicator = engine, engine.mpi, communicator
        self.label, self.timeout = label, timeout
        self.failure: Exception | None = None
        self._coalescing: list[MpiWork] | None = None
        self._sequence = 0
        self._group_name, self._group_desc = label, ""

    # --- identity and life -------------------------------------------------------------------------------

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    def name(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    # PyTorch's own keep these in a registered C++ backend, which a group written in Python has not.

    def setGroupName(self, name: str) -> None:
        """Set the name that is unique among the groups of the job."""
        self._group_name = name

    def getGroupName(self) -> str:
        """Return the name that is unique among the groups of the job."""
        return self._group_name

    def setGroupDesc(self, description: str) -> None:
        """Set what the group is for."""
        self._group_desc = description

    def getGroupDesc(self) -> str:
        """Return what the group is for."""
        return self._group_desc

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long operations may wait from now on."""
        self.timeout = timeout

    def shutdown(self) -> None:
        """Wait for the operations under way and free the communicator."""
        if self.communicator is None:
            return
        if self.failure is None:
            for work in self.engine.outstanding(self):
                work.wait()
            with self.engine.lock:
                if not self.mpi.Is_finalized():
                    self.communicator.Free()
        self.communicator = None

    def abort(self) -> None:
        """Give the group up: operations under way are abandoned, later ones fail."""
        self.failure = self.failure or OperationError(f"{self.label} has been aborted")

    def _set_sequence_number_for_group(self) -> None:
        self._sequence = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _submit(
        self,
        name: str,
        starts: Sequence[Start],
        outputs: Tensors,
        options: Any = None,
        *,
        inputs: Tensors = (),
    ) -> MpiWork:
        """Issue the MPI calls of one operation, in the order in which the program asks for them."""
        check_tensors(name, *outputs, *inputs)
        timeout = getattr(options, "timeout", None)
        limit = self.timeout if timeout is None or timeout <= timedelta(0) else timeout
        work = MpiWork(self.engine, self, name, [], outputs, limit.total_seconds())
        if self.communicator is None:
            raise OperationError(f"{work.describe()}: the process group has been destroyed")
        if self.failure is not None:
            raise OperationError(
                f"{work.describe()} cannot start: an earlier operation of the group failed",
                reason=str(self.failure).splitlines()[0],
            ) from self.failure
        with self.engine.lock:
            self._sequence += 1
            for start in starts:
                work.parts.append(start())
            self.engine.add(work, awaited=not getattr(options, "asyncOp", True))
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> JoinedWork:
        works, self._coalescing = self._coalescing or [], None
        return JoinedWork(works)

    # --- checks ------------------------------------------------------------------------------------------

    def _reduction(self, opts: Any, tensor: torch.Tensor) -> Reduction:
        op = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        return reduction(self.mpi, op, tensor.dtype, self.size())

    def _check_list(self, name: str, tensors: Tensors) -> None:
        check_size(name, "tensors in the list", len(tensors), self.size())

    def _split_counts(self, what: str, tensor: torch.Tensor, splits: Sequence[int]) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self.size():
                raise OperationError(
                    f"all_to_all_single: {what} cannot be split equally",
                    found=f"{rows} rows for {self.size()} ranks",
                    hint=f"pass {what}_split_sizes",
                )
            splits = [rows // self.size()] * self.size()
        check_size("all_to_all_single", f"{what} split sizes", len(splits), self.size())
        check_size("all_to_all_single", f"sum of {what} split sizes", sum(splits), rows)
        row = tensor.numel() // rows if rows else 0
        return [split * row for split in splits]
