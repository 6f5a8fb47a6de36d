"""One fault of the MPI collectives, named by the first argument."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from job import join, raises, say, topology
from torchport.errors import OperationError
from torchport_cpu.mpi_work import CollectiveTimeoutError

FAULT = sys.argv[1]


def late() -> None:
    """Rank 1 never comes: rank 0 gets errors, of every kind in which it can wait."""
    _, place = join(seconds=60)
    brief = timedelta(seconds=1)
    groups = [dist.new_group(timeout=brief) for _ in range(2)]
    store = dist.distributed_c10d._get_default_store()
    if place.rank == 1:
        store.wait(["over"], timedelta(seconds=60))
        return
    start = time.monotonic()
    names = ("all_reduce", "rank 0 of 2", "group '", "within 1 s", "TORCHPORT_TIMEOUT")
    raises(CollectiveTimeoutError, lambda: dist.all_reduce(torch.ones(2), group=groups[0]), *names)
    assert 1 <= time.monotonic() - start < 5
    later = lambda: dist.broadcast(torch.ones(2), 0, group=groups[0])  # noqa: E731
    raises(OperationError, later, "broadcast", "earlier operation of the group failed", "all_reduce")
    say("ok", place.rank, "an operation")

    work = dist.all_reduce(torch.ones(2), group=groups[1], async_op=True)
    assert not work.is_completed()
    raises(OperationError, lambda: work.wait(timedelta(milliseconds=10)), "0.01 s")
    raises(RuntimeError, lambda: work.get_future().wait(), "CollectiveTimeoutError", "all_reduce")
    assert not work.is_success()
    assert isinstance(work.exception(), CollectiveTimeoutError)
    say("ok", place.rank, "a future")

    make = lambda: dist.new_group([0, 1], timeout=brief)  # noqa: E731
    raises(OperationError, make, "not created by all", "[1]", "same order")
    say("ok", place.rank, "a new group")
    store.set("over", "yes")


def uncaught() -> None:
    """Rank 1 fails while rank 0 waits for it."""
    _, place = join(seconds=60)
    if place.rank == 1:
        raise ValueError("the fault of rank 1")
    dist.all_reduce(torch.ones(2))


def killed() -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    _, place = join(seconds=60)
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(2))


def left() -> None:
    """Rank 1 ends with an error code, but without an error."""
    _, place = join(seconds=2)
    if place.rank == 1:
        sys.exit(3)
    dist.all_reduce(torch.ones(2))


def world() -> None:
    """The processes are not in one MPI job."""
    from torchport.errors import LaunchError
    from torchport.plugin import CollectivesSpec, Topology
    from torchport_cpu.mpi import MpiCollectives

    place = topology()
    if place.world_size == 1:
        place = Topology(rank=0, world_size=2, local_rank=0, local_world_size=2, source="local")
    spec = CollectivesSpec(name="mpi", factory="torchport_cpu.mpi:MpiCollectives")
    text = raises(LaunchError, lambda: MpiCollectives(spec).rendezvous(place, timedelta(seconds=5)))
    say(text)


def wait() -> None:
    """All ranks wait until they are stopped."""
    _, place = join(seconds=60)
    say("waiting", place.rank, os.getpid())
    if place.rank == 0:
        signal.pause()
    dist.barrier()


globals()[FAULT]()
