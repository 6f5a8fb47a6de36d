"""Level L2, further: objects, and the default group as `torch.distributed` and what is built on it use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from torchport.state import PartialState
from torchport.testing.checks import SEVERAL, Checks, NotClaimed, require
from torchport.testing.claims import one_process_only
from torchport.testing.collectives import Group, group_bench

CHECKS = Checks("L2", group_bench, SEVERAL, one_process_only)


# --- objects ---------------------------------------------------------------------------------------------


@CHECKS("objects.gather", "objects of all processes are gathered in order of rank, of any size")
def objects_are_gathered(group: Group) -> None:
    """Gather values of different types and lengths."""
    value = {"rank": group.rank, "text": "x" * 1000 * group.rank}
    gathered = group.collectives.all_gather_object(value)
    expected = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(group.size)]
    require(gathered == expected, f"gathered {str(gathered)[:200]}")


@CHECKS("objects.are-copies", "gathered objects are copies, a process's own included")
def objects_are_copies(group: Group) -> None:
    """Change what was gathered and look at what was given."""
    value = {"list": [group.rank]}
    gathered = group.collectives.all_gather_object(value)
    for item in gathered:
        item["list"].append("changed")
    require(value == {"list": [group.rank]}, "changing what was gathered changed the object that was given")


@CHECKS("objects.broadcast", "a list of objects is overwritten by that of any rank")
def objects_are_broadcast(group: Group) -> None:
    """Broadcast from each rank in turn."""
    for source in range(group.size):
        values = [group.rank, "a" * group.rank, None]
        returned = group.collectives.broadcast_object_list(values, source)
        require(values == [source, "a" * source, None], f"from rank {source} came {values}")
        require(returned is values, "it did not return the list itself")


# --- the default group of torch.distributed --------------------------------------------------------------


def _default_group(group: Group) -> None:
    if not dist.is_initialized():
        raise NotClaimed("these collectives open no default group of torch.distributed")


def attempt(what: str, operation: Callable[[], Any]) -> Any:
    """Run an operation that a process group may lack; every rank must find that alike.

    Raises:
        NotClaimed: if the process group says that it does not have it.
    """
    try:
        return operation()
    except NotImplementedError as error:
        raise NotClaimed(f"its process group has no {what}: {_first_line(error)}") from error
    except (RuntimeError, ValueError) as error:
        text = str(error).lower()
        if any(
            word in text
            for word in ("not support", "unsupport", "not implement", "cannot use", "no backend type")
        ):
            raise NotClaimed(f"its process group has no {what}: {_first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@CHECKS("torch.place", "the default group has the size and the ranks of the job")
def torch_knows_the_place(group: Group) -> None:
    """Ask `torch.distributed`."""
    _default_group(group)
    found = (dist.get_rank(), dist.get_world_size())
    require(found == (group.rank, group.size), f"rank and size are {found}")


@CHECKS("torch.avg", "ReduceOp.AVG divides the sum by the number of processes")
def torch_averages(group: Group) -> None:
    """Reduce with AVG."""
    _default_group(group)
    tensor = torch.tensor([2.0 + 4 * group.rank], device=group.device)
    attempt("ReduceOp.AVG", lambda: dist.all_reduce(tensor, dist.ReduceOp.AVG))
    expected = 2.0 + 4 * (group.size - 1) / 2
    require(tensor.item() == expected, f"the average is {tensor.item()} instead of {expected}")


@CHECKS("torch.all_to_all", "all_to_all_single gives each rank its part from every rank, in order")
def torch_all_to_all(group: Group) -> None:
    """Exchange two elements with each."""
    _default_group(group)
    sent = torch.tensor([10.0 * group.rank + i for i in range(2 * group.size)], device=group.device)
    received = torch.empty_like(sent)
    attempt("all_to_all", lambda: dist.all_to_all_single(received, sent))
    expected = [10.0 * r + 2 * group.rank + i for r in range(group.size) for i in range(2)]
    require(received.cpu().tolist() == expected, f"received {received.cpu().tolist()} instead of {expected}")


@CHECKS("torch.reduce-to-one", "reduce leaves the sum on the rank that it names")
def torch_reduces_to_one(group: Group) -> None:
    """Reduce to the last rank."""
    _default_group(group)
    last = group.size - 1
    tensor = torch.tensor([1.0 + group.rank], device=group.device)
    attempt("reduce", lambda: dist.reduce(tensor, last))
    expected = float(sum(range(1, group.size + 1)))
    require(
        group.rank != last or tensor.item() == expected, f"the sum is {tensor.item()} instead of {expected}"
    )


@CHECKS("torch.gather-to-one", "gather gives the rank that it names all tensors in order of rank")
def torch_gathers_to_one(group: Group) -> None:
    """Gather on rank 0."""
    _default_group(group)
    mine = torch.tensor([5.0 + group.rank], device=group.device)
    parts = [torch.empty_like(mine) for _ in range(group.size)] if group.rank == 0 else None
    attempt("gather", lambda: dist.gather(mine, parts, 0))
    found = [part.item() for part in parts or ()]
    expected = [5.0 + rank for rank in range(group.size)] if group.rank == 0 else []
    require(found == expected, f"gathered {found} instead of {expected}")


@CHECKS("torch.send-recv", "a tensor can be sent from one rank to another")
def torch_sends(group: Group) -> None:
    """Send from rank 0 to rank 1."""
    _default_group(group)
    tensor = (
        torch.arange(4.0, device=group.device) if group.rank == 0 else torch.zeros(4, device=group.device)
    )
    if group.rank < 2:
        operation = dist.send if group.rank == 0 else dist.recv
        attempt("point-to-point operations", lambda: operation(tensor, 1 - group.rank))
    if group.rank == 1:
        require(tensor.cpu().tolist() == [0.0, 1.0, 2.0, 3.0], f"rank 1 received {tensor.cpu().tolist()}")


@CHECKS("torch.subgroup", "a group of some ranks exchanges among these alone")
def torch_subgroups(group: Group) -> None:
    """Make a group of rank 0 alone and one of all."""
    _default_group(group)
    alone = attempt("subgroups", lambda: dist.new_group([0]))
    everyone = attempt("subgroups", lambda: dist.new_group(list(range(group.size))))
    tensor = torch.tensor([1.0 + group.rank], device=group.device)
    if group.rank == 0:
        dist.all_reduce(tensor, group=alone)
        require(tensor.item() == 1.0, f"in a group of its own, rank 0 reduced 1 to {tensor.item()}")
    dist.all_reduce(tensor, group=everyone)
    expected = float(sum(range(1, group.size + 1)))
    require(tensor.item() == expected, f"in a group of all, the sum is {tensor.item()} instead of {expected}")
    if group.rank == 0:
        dist.destroy_process_group(alone)
    dist.destroy_process_group(everyone)


@CHECKS("torch.async", "an operation that was started with async_op is done after wait()")
def torch_waits(group: Group) -> None:
    """Reduce in the background."""
    _default_group(group)
    tensor = torch.tensor([1.0 + group.rank], device=group.device)
    work = attempt("asynchronous operations", lambda: dist.all_reduce(tensor, async_op=True))
    require(work is not None, "async_op=True returned no work")
    work.wait()
    expected = float(sum(range(1, group.size + 1)))
    require(tensor.item() == expected, f"after wait() the sum is {tensor.item()} instead of {expected}")


@CHECKS("group.reopens", "the group can be left and opened again in the same processes")
def group_reopens(group: Group) -> None:
    """Leave, open, reduce."""
    group.collectives.barrier()
    PartialState._reset_state()
    group.open()
    tensor = torch.tensor([1.0], device=group.device)
    group.collectives.all_reduce(tensor)
    require(tensor.item() == group.size, f"in the new group the sum of ones is {tensor.item()}")
