"""Level L2: several processes exchange tensors and objects, compared with exact values."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from torchport.config.kwargs import InitProcessGroupKwargs
from torchport.errors import OperationError
from torchport.ops import exchange
from torchport.plan.selection import Request
from torchport.plugin.collectives import Collectives
from torchport.runtime import Runtime
from torchport.state import PartialState
from torchport.testing.checks import LATE, SEVERAL, Check, CheckFailure, Checks, Place, Subject, require
from torchport.testing.claims import one_process_only

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")
"""Names of the dtypes that collectives carry unless their suite says otherwise."""

TIMEOUT = 60.0
"""Seconds that an operation may wait in these checks."""

SHORT = 3.0
"""The timeout that must turn into an error."""

PROMPT = 20.0
"""Seconds within which it must."""


class Group:
    """The open process group of a job.

    Args:
        subject: The plugin under test.
        place: This process.
        timeout: Seconds that an operation may wait.
    """

    def __init__(self, subject: Subject, place: Place, timeout: float = TIMEOUT) -> None:
        self.subject, self.place, self.timeout = subject, place, timeout
        self.rank, self.size = place.rank, place.world_size
        self.tell = place.tell
        self._rounds = 0
        self.open()

    def open(self) -> None:
        """Join the group, as a script does."""
        arguments = {"backend": self.subject.backend, "collectives": self.subject.collectives or None}
        handler = InitProcessGroupKwargs(timeout=timedelta(seconds=self.timeout))
        request = Request(arguments=arguments, asked_by="the conformance kit", handlers=(handler,))
        self.runtime = Runtime.open(request, commits=("backend", "collectives"))
        require(
            self.runtime.collectives is not None, f"a job of {self.size} processes opened no process group"
        )
        self.device = self.runtime.device

    @property
    def collectives(self) -> Collectives:
        """The collectives under test."""
        found = self.runtime.collectives
        assert found is not None
        return found

    @property
    def store(self) -> Any:
        """The store at which the processes met: it works when the collectives do not."""
        return Runtime.store

    def after_check(self, failed: bool) -> None:
        """Meet the other ranks at the store; where a check failed, leave the group and open it anew."""
        self._rounds += 1
        prefix = f"conformance/{self.subject.name}/{Runtime.generation}/{self._rounds}"
        self.store.set(f"{prefix}/{self.rank}", "1" if failed else "0")
        if any(self.store.get(f"{prefix}/{rank}") == b"1" for rank in range(self.size)):
            PartialState._reset_state()
            self.open()

    def tensor(self, values: Sequence[float], dtype: str) -> torch.Tensor:
        """Return a tensor on the device."""
        return torch.tensor(values).to(getattr(torch, dtype)).to(self.device)

    def same(self, actual: torch.Tensor, expected: Sequence[Any], dtype: str, what: str) -> None:
        """Check values and dtype."""
        require(str(actual.dtype) == f"torch.{dtype}", f"{what} has dtype {actual.dtype} instead of {dtype}")
        require(actual.device == self.device, f"{what} is on {actual.device} instead of {self.device}")
        values = actual.cpu().tolist()
        require(values == list(expected), f"{what} is {values} instead of {list(expected)}")


class Impatient(Group):
    """A process group that is not used again after a check."""

    def after_check(self, failed: bool) -> None:
        """Where the check failed, end this process, and with it the job: the others may wait in vain."""
        if failed:
            os._exit(1)


@contextmanager
def group_bench(subject: Subject, place: Place) -> Iterator[Group]:
    """Open the process group for a number of checks."""
    PartialState._reset_state()
    try:
        yield Group(subject, place)
    finally:
        PartialState._reset_state()


@contextmanager
def impatient_bench(subject: Subject, place: Place) -> Iterator[Group]:
    """Open a process group whose operations may wait for some seconds only; to meet, processes have longer."""
    PartialState._reset_state()
    try:
        Group(subject, place)
        PartialState._reset_state()
        yield Impatient(subject, place, SHORT)
    finally:
        PartialState._reset_state()


_checks = Checks("L2", group_bench, SEVERAL, one_process_only)
_late = Checks("L2", impatient_bench, LATE, one_process_only)


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level, for the dtypes that the subject names."""
    from torchport.testing import collectives_torch

    typed = Checks("L2", group_bench, SEVERAL, one_process_only)
    wanted = tuple(dict.fromkeys((*DTYPES, *subject.dtypes)))
    for op in _REDUCED:
        typed.each(f"all_reduce.{op}.{{}}", f"all_reduce {op} of {{}} is exact", wanted)(_reduce_with(op))
    for function, name in _TYPED:
        typed.each(f"{name}.{{}}", f"{name} of {{}} is exact", wanted)(function)
    other = {c.id for c in typed if c.id.rpartition(".")[2] not in subject.dtypes}
    kept = [replace(c, unclaimed=_dtype_not_claimed) if c.id in other else c for c in typed]
    return [*kept, *_checks, *collectives_torch.CHECKS, *_late]


def _dtype_not_claimed(subject: Subject) -> str:
    return one_process_only(subject) or f"the suite's dtypes are {', '.join(subject.dtypes)}"


# --- every operation, every dtype ------------------------------------------------------------------------

_REDUCED: dict[str, Callable[[list[int]], int]] = {"sum": sum, "max": max, "min": min, "product": math.prod}


def _contribution(rank: int) -> list[int]:
    """Six small numbers of a rank, in which no two ranks agree and whose order matters."""
    return [1 + rank, 2 + rank, 5 - rank, 3, 1 + 2 * rank, 4]


def _reduce_with(op: str) -> Callable[[Group, str], None]:
    def reduced(group: Group, dtype: str) -> None:
        """Reduce in place; check values, dtype and that the tensor itself is returned."""
        tensor = group.tensor(_contribution(group.rank), dtype)
        returned = group.collectives.all_reduce(tensor, op)
        columns = zip(*(_contribution(rank) for rank in range(group.size)), strict=True)
        expected = [_REDUCED[op](list(column)) for column in columns]
        group.same(tensor, expected, dtype, f"the {op}")
        require(returned is tensor, "it did not return the tensor itself")

    return reduced


def _gathered(group: Group, dtype: str) -> None:
    """Gather rows in order of rank."""
    tensor = group.tensor(_contribution(group.rank), dtype).view(3, 2)
    expected = [
        row for r in range(group.size) for row in group.tensor(_contribution(r), dtype).view(3, 2).tolist()
    ]
    group.same(group.collectives.all_gather(tensor), expected, dtype, "what was gathered")


def _scattered_sum(group: Group, dtype: str) -> None:
    """Sum and share out."""
    whole = [value for share in range(group.size) for value in (share, 2 * share + 1)]
    tensor = group.tensor([value * (group.rank + 1) for value in whole], dtype)
    total = sum(rank + 1 for rank in range(group.size))
    expected = [whole[2 * group.rank] * total, whole[2 * group.rank + 1] * total]
    group.same(group.collectives.reduce_scatter(tensor), expected, dtype, "this rank's share")


def _broadcasted(group: Group, dtype: str) -> None:
    """Overwrite everywhere by each rank in turn."""
    for source in range(group.size):
        tensor = group.tensor(_contribution(group.rank), dtype)
        returned = group.collectives.broadcast(tensor, source)
        group.same(tensor, _contribution(source), dtype, f"what rank {source} sent")
        require(returned is tensor, "it did not return the tensor itself")


def _scattered(group: Group, dtype: str) -> None:
    """Share out the parts of each rank in turn."""
    for source in range(group.size):
        parts = [group.tensor([10 * source + rank, rank], dtype) for rank in range(group.size)]
        tensor = group.tensor([99, 99], dtype)
        group.collectives.scatter(tensor, parts if group.rank == source else None, source)
        group.same(tensor, [10 * source + group.rank, group.rank], dtype, f"the part from rank {source}")


_TYPED: tuple[tuple[Callable[[Group, str], None], str], ...] = (
    (_gathered, "all_gather"),
    (_scattered_sum, "reduce_scatter"),
    (_broadcasted, "broadcast"),
    (_scattered, "scatter"),
)


# --- shapes ----------------------------------------------------------------------------------------------


@_checks("group.size", "the group has as many members as the job has processes")
def size_is_that_of_the_job(group: Group) -> None:
    """Compare."""
    size = group.collectives.world_size
    require(size == group.size, f"world_size is {size} in a job of {group.size}")


@_checks("shapes.large", "a tensor of 4 MiB is reduced exactly")
def large_tensors(group: Group) -> None:
    """More than any eager buffer or single packet holds."""
    tensor = torch.arange(2**20, dtype=torch.float32, device=group.device) % 1024 + group.rank
    expected = (torch.arange(2**20, dtype=torch.float32) % 1024) * group.size + sum(range(group.size))
    group.collectives.all_reduce(tensor)
    wrong = int((tensor.cpu() != expected).sum())
    require(wrong == 0, f"{wrong} of {2**20} sums are wrong")


@_checks("shapes.scalar", "a tensor without dimensions can be reduced")
def scalars(group: Group) -> None:
    """Reduce a loss."""
    tensor = torch.tensor(1.5 + group.rank, device=group.device)
    group.collectives.all_reduce(tensor)
    expected = 1.5 * group.size + sum(range(group.size))
    require(tensor.item() == expected, f"the sum is {tensor.item()} instead of {expected}")


@_checks("shapes.non-contiguous", "a tensor that is not contiguous is gathered by its values")
def non_contiguous(group: Group) -> None:
    """Gather a transposed tensor."""
    tensor = (torch.arange(6.0, device=group.device).view(2, 3) + 10 * group.rank).t()
    gathered = group.collectives.all_gather(tensor).cpu().tolist()
    expected = [[i + 10.0 * r, i + 3 + 10.0 * r] for r in range(group.size) for i in range(3)]
    require(gathered == expected, f"gathered {gathered} instead of {expected}")


@_checks("shapes.uneven", "tensors of uneven length are gathered whole, padded first")
def uneven_shapes(group: Group) -> None:
    """Pad across processes, gather, and cut: what scripts do with sequences."""
    mine = torch.full((group.rank + 1, 2), float(group.rank), device=group.device)
    padded = exchange.pad_across_processes(mine, 0, -1)
    require(padded.shape == (group.size, 2), f"padded to {tuple(padded.shape)}")
    gathered = exchange.gather(padded).cpu().view(group.size, group.size, 2)
    for rank in range(group.size):
        rows = gathered[rank].tolist()
        expected = [[float(rank)] * 2] * (rank + 1) + [[-1.0] * 2] * (group.size - rank - 1)
        require(rows == expected, f"from rank {rank} came {rows} instead of {expected}")


@_checks("reduce.mean", "the mean over processes is the sum divided by their number")
def mean_is_divided(group: Group) -> None:
    """Reduce through `torchport.utils.reduce`."""
    mean = exchange.reduce(torch.tensor([2.0 + 4 * group.rank], device=group.device), "mean")
    expected = 2.0 + 4 * (group.size - 1) / 2
    require(mean.item() == expected, f"the mean is {mean.item()} instead of {expected}")


@_checks("all_reduce.unknown", "an operation that does not exist is an OperationError")
def unknown_operation(group: Group) -> None:
    """Ask for the median."""
    try:
        group.collectives.all_reduce(torch.ones(1, device=group.device), "median")
    except OperationError:
        return
    require(False, "all_reduce took the operation 'median'")


# --- waiting ---------------------------------------------------------------------------------------------


@_checks("barrier.waits", "nobody leaves a barrier before everyone has come")
def barrier_waits(group: Group) -> None:
    """The last rank comes once all others are on their way in, and a moment later."""
    key = f"conformance/barrier/{group.subject.name}/{Runtime.generation}"
    last = group.size - 1
    if group.rank == last:
        for rank in range(last):
            group.store.get(f"{key}/{rank}")
        time.sleep(0.2)  # what the others might wrongly not wait
        group.store.set(f"{key}/came", "1")
    else:
        group.store.set(f"{key}/{group.rank}", "1")
    group.collectives.barrier()
    came = group.store.check([f"{key}/came"])
    require(came, f"rank {group.rank} left the barrier before rank {last} had come")


@_late("timeout.is-an-error", "an operation that waits in vain fails once its timeout is over")
def timeout_is_an_error(group: Group) -> None:
    """Rank 0 reduces, and nobody else does. A library that ends the process instead fails, too: it does not hang."""
    key = f"conformance/timeout/{group.subject.name}"
    group.collectives.all_reduce(torch.ones(1, device=group.device))  # some connect with the first operation
    group.tell("dying")
    if group.rank:
        try:
            group.store.wait([key], timedelta(seconds=PROMPT))
        except RuntimeError as in_vain:
            waits = f"rank 0 still waits after {PROMPT:g} s, with a timeout of {SHORT:g} s"
            raise CheckFailure(waits) from in_vain
        return
    started, error = time.monotonic(), ""
    try:
        tensor = torch.ones(4, device=group.device)
        group.collectives.all_reduce(tensor)
        group.runtime.backend.synchronize(group.device)
        tensor.cpu()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    took = time.monotonic() - started
    group.store.set(key, "1")
    require(error, "all_reduce came to an end although no other rank took part")
    require(took < PROMPT, f"it took {took:.0f} s with a timeout of {SHORT:g} s")
