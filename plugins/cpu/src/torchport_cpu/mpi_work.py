"""Operations under way over MPI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchport.errors import OperationError

if TYPE_CHECKING:
    from torchport_cpu.mpi_base import MpiGroup
    from torchport_cpu.mpi_engine import Engine


class CollectiveTimeoutError(OperationError):
    """Not all processes came to a collective operation within the group's timeout."""


@dataclass(slots=True)
class Part:
    """One nonblocking MPI call of an operation.

    Attributes:
        request: The `MPI.Request`.
        keep: What MPI reads or writes until the request is complete.
        finish: Run after completion: unpacks what was received.
        status: The `MPI.Status` of a receive.
        expected: Number of bytes that a receive must bring; -1 where it does not matter.
    """

    request: Any
    keep: tuple[Any, ...] = ()
    finish: Callable[[], None] | None = None
    status: Any = None
    expected: int = -1


class MpiWork(dist.Work):
    """A collective or point-to-point operation that may still be under way.

    Args:
        engine: What drives it to completion.
        group: The process group it belongs to.
        name: Name of the operation, for errors.
        parts: The MPI calls it consists of.
        outputs: The tensors it writes.
        timeout: Seconds after which it fails.
    """

    def __init__(
        self,
        engine: Engine,
        group: MpiGroup,
        name: str,
        parts: list[Part],
        outputs: Sequence[torch.Tensor],
        timeout: float,
    ) -> None:
        super().__init__()
        self.engine, self.group, self.operation = engine, group, name
        self.parts, self.outputs, self.timeout = parts, list(outputs), timeout
        self.deadline = time.monotonic() + timeout
        self.error: Exception | None = None
        self._done = threading.Event()
        self._source = -1
        self._future_lock = threading.Lock()
        self._raw: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None

    # --- what the engine calls ---------------------------------------------------------------------------

    def advance(self, mpi: Any) -> bool:
        """Test the requests and unpack what has arrived; return whether the operation is over."""
        try:
            while self.parts:
                part = self.parts[0]
                if not part.request.Test(part.status):
                    return self._expired()
                self._complete(mpi, part)
                self.parts.pop(0)
        except Exception as error:  # handed to whoever waits
            if len(self.parts) > 1:
                self.engine.abandon(self)
            failure = error
            if isinstance(error, mpi.Exception):
                failure = OperationError(f"{self.describe()} failed", reason=str(error))
                failure.__cause__ = error
            self.error = failure
        self._done.set()
        return True

    def publish(self) -> None:
        """Complete the future; its callbacks run here, so no lock may be held."""
        with self._future_lock:
            raw, self._raw = self._raw, None
        if raw is not None:
            raw.set_result(None)

    def _complete(self, mpi: Any, part: Part) -> None:
        if part.status is not None:
            self._source = part.status.Get_source()
            received = part.status.Get_count(mpi.BYTE)
            if part.expected >= 0 and received != part.expected:
                raise OperationError(
                    f"{self.describe()} received a tensor of another size",
                    found=f"{received} bytes from rank {self._source}",
                    reason=f"the tensor to receive into has {part.expected} bytes",
                )
        if part.finish is not None:
            with torch.inference_mode(any(tensor.is_inference() for tensor in self.outputs)):
                part.finish()

    def _expired(self) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.error = CollectiveTimeoutError(
            f"{self.describe()} was not joined by all processes within {self.timeout:g} s",
            reason="another rank has failed, is slower than the timeout, or did not call the same operation",
            hint="look at the other ranks' output, or allow more time: TORCHPORT_TIMEOUT=<seconds>",
        )
        self.group.failure = self.error
        self.engine.abandon(self)
        self._done.set()
        return True

    def describe(self) -> str:
        """Name the operation, the rank and the group."""
        return f"{self.operation} on rank {self.group.rank()} of {self.group.size()} ({self.group.label})"

    # --- torch.distributed.Work --------------------------------------------------------------------------

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the operation is over.

        Args:
            timeout: How long to wait at most; zero for as long as the group's timeout allows.

        Raises:
            CollectiveTimeoutError: if other processes did not come in time.
            OperationError: if MPI reports a fault.
        """
        limit = timeout.total_seconds()
        if not self.engine.drive(self._done, limit if limit > 0 else None):
            raise CollectiveTimeoutError(
                f"{self.describe()} is not complete after waiting for {limit:g} s",
                hint="wait longer, or without a timeout of its own",
            )
        if self.error is not None:
            raise self.error
        return True

    def is_completed(self) -> bool:
        """Return whether the operation is over, well or not."""
        if not self._done.is_set():
            self.engine.poll()
        return self._done.is_set()

    def is_success(self) -> bool:
        """Return whether the operation is over and did not fail."""
        return self.is_completed() and self.error is None

    def exception(self) -> Exception | None:
        """Return why the operation failed; `None` while it has not."""
        return self.error

    def synchronize(self) -> None:
        """Wait until the operation is over."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that the operation has written."""
        self.wait()
        return self.outputs

    def source_rank(self) -> int:
        """Return the rank from which a receive from any source came."""
        return self._source

    def _source_rank(self) -> int:
        return self._source

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Return a future of the tensors that the operation writes."""
        with self._future_lock:
            if self._future is None:
                self._raw = torch.futures.Future()
                self._future = self._raw.then(lambda _: self._value())
        if self._done.is_set():
            self.publish()
        return self._future

    def _value(self) -> list[torch.Tensor]:
        if self.error is not None:
            raise self.error
        return self.outputs


class JoinedWork(dist.Work):
    """Several operations, waited for as one."""

    def __init__(self, works: Sequence[MpiWork]) -> None:
        super().__init__()
        self.works = list(works)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until all are over."""
        return all(work.wait(timeout) for work in self.works)

    def is_completed(self) -> bool:
        """Return whether all are over."""
        return all(work.is_completed() for work in self.works)

    def is_success(self) -> bool:
        """Return whether all are over and none failed."""
        return all(work.is_success() for work in self.works)

    def exception(self) -> Exception | None:
        """Return why the first that failed did."""
        return next((work.error for work in self.works if work.error is not None), None)

    def synchronize(self) -> None:
        """Wait until all are over."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that all have written."""
        return [tensor for work in self.works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Return a future of the tensors that all write."""
        collected = torch.futures.collect_all([work.get_future() for work in self.works])
        return collected.then(lambda done: [tensor for future in done.wait() for tensor in future.wait()])
