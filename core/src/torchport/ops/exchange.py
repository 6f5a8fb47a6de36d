"""Exchange nested structures of tensors, and objects, between the processes of the job.

With one process every operation returns what it was given (copied where a result is expected to be new). After the
end of a run of several, every operation raises an error until another run is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchport.errors import OperationError
from torchport.ops.pytree import all_tensors, describe, recursively_apply, slice_tensors
from torchport.plugin.collectives import Collectives


@dataclass(slots=True)
class _Group:
    """The processes that exchange."""

    collectives: Collectives | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    debug: bool = False
    ended: bool = False


_group = _Group()


def use_group(
    collectives: Collectives | None, rank: int, world_size: int, device: torch.device, *, debug: bool = False
) -> None:
    """Say over which processes the operations of this module work; called once when a run starts."""
    _group.collectives = collectives if world_size > 1 else None
    _group.rank, _group.world_size, _group.device, _group.debug = rank, world_size, device, debug
    _group.ended = False


def reset_group() -> None:
    """Go back to one process."""
    use_group(None, 0, 1, torch.device("cpu"))


def end_group() -> None:
    """Refuse further operations: the processes that exchanged have parted, and one of them is not the job."""
    reset_group()
    _group.ended = True


def run_has_ended(wanted: str) -> OperationError:
    """Return the error of an operation that needs the other processes when the run is over."""
    return OperationError(
        f"{wanted} needs all processes, and this run has ended",
        reason="end_training(), destroy_process_group() or _reset_state() was called: the processes have parted",
        hint="call it before the end of the run, or make a new Accelerator() or PartialState() on every process",
    )


def _collectives(operation: str) -> Collectives | None:
    """Return the open process group; `None` where there is one process.

    Raises:
        OperationError: if a run of several processes has ended.
    """
    if _group.ended:
        raise run_has_ended(f"{operation}()")
    return _group.collectives


def gather(tensor: Any) -> Any:
    """Concatenate the tensors of all processes along the first dimension, in order of rank, on every process.

    Args:
        tensor: A structure of tensors, each of the same shape on every process. A tensor without dimensions
            counts as one of shape `(1,)`.

    Returns:
        The same structure; a tensor of shape `(n, ...)` becomes `(processes * n, ...)`.
    """
    collectives = _checked("gather", tensor)

    def one(leaf: torch.Tensor) -> torch.Tensor:
        leaf = leaf.detach().unsqueeze(0) if leaf.ndim == 0 else leaf.detach()
        return collectives.all_gather(leaf) if collectives is not None else leaf

    return recursively_apply(one, tensor, error_on_other_type=True)


def gather_object(object: Any) -> list[Any]:
    """Return the items of the lists of all processes in one list, in order of rank, on every process.

    Args:
        object: A list of picklable items; any other object counts as a list of one.
    """
    mine = list(object) if isinstance(object, (list, tuple)) else [object]
    collectives = _collectives("gather_object")
    if collectives is None:
        return mine
    return [item for items in collectives.all_gather_object(mine) for item in items]


def gather_for_metrics(
    data: Any, remainder: int | Sequence[int], *, as_objects: bool = False, readers: int = 1
) -> Any:
    """Gather the results of a batch, without those of samples that only filled up the last round.

    Args:
        data: Tensors of one shape on all processes; anything else is gathered as objects.
        remainder: Number of results to keep, or a number for each process; 0 or less keeps all.
        as_objects: Whether to gather tensors as objects, in a list.
        readers: Number of processes, one after the other, that work on the same batch: the first one's results count.
    """
    collectives = _collectives("gather_for_metrics")
    if readers > 1 and collectives is not None:
        return _gather_from_firsts(data, remainder, readers, as_objects=as_objects or not all_tensors(data))
    if as_objects or not all_tensors(data):
        if isinstance(remainder, int) or collectives is None:
            objects = gather_object(data)
            return objects[:remainder] if isinstance(remainder, int) and remainder > 0 else objects
        mine = list(data) if isinstance(data, (list, tuple)) else [data]
        return gather_object(mine[: remainder[_group.rank]])
    gathered = gather(data)
    if isinstance(remainder, int):
        return slice_tensors(gathered, slice(remainder)) if remainder > 0 else gathered

    def kept(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[:n] for part, n in zip(leaf.chunk(len(remainder)), remainder, strict=True)])

    return recursively_apply(kept, gathered)


def _gather_from_firsts(data: Any, remainder: int | Sequence[int], readers: int, *, as_objects: bool) -> Any:
    """Gather what the first of every few processes has, which work on one batch."""
    keep = remainder if isinstance(remainder, int) else max(sum(remainder), 0)
    first = _group.rank % readers == 0
    if as_objects:
        objects = gather_object((data if isinstance(data, (list, tuple)) else [data]) if first else [])
        return objects[:keep] if keep > 0 else objects

    def firsts(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat(leaf.chunk(_group.world_size)[::readers])

    gathered = recursively_apply(firsts, gather(data))
    return slice_tensors(gathered, slice(keep)) if keep > 0 else gathered


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Return the tensors of one process on every process.

    Args:
        tensor: A structure of tensors of the same shapes and dtypes on every process.
        from_process: Rank whose tensors are taken.
    """
    collectives = _checked("broadcast", tensor)
    if collectives is None:
        return tensor
    return recursively_apply(
        lambda leaf: collectives.broadcast(leaf.detach().clone(), from_process),
        tensor,
        error_on_other_type=True,
    )


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite the items of a list on every process by those of one process, and return the list."""
    collectives = _collectives("broadcast_object_list")
    if collectives is not None:
        collectives.broadcast_object_list(object_list, from_process)
    return object_list


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Reduce the tensors of all processes, on every process.

    Args:
        tensor: A structure of tensors of the same shapes on every process.
        reduction: `"mean"`, `"sum"`, `"max"`, `"min"`, or `"none"` (which returns the tensors unchanged).
        scale: Factor applied to the result.

    Raises:
        OperationError: if `reduction` is none of these.
    """
    known = ("mean", "sum", "max", "min", "none")
    if reduction not in known:
        raise OperationError(f"reduce has no reduction {reduction!r}", hint=f"one of {', '.join(known)}")
    collectives = _checked("reduce", tensor)

    def one(leaf: torch.Tensor) -> torch.Tensor:
        result = leaf.detach().clone()
        if collectives is not None and reduction != "none":
            if reduction == "mean" and not (result.is_floating_point() or result.is_complex()):
                result = result.float()
            collectives.all_reduce(result, "sum" if reduction == "mean" else reduction)
            if reduction == "mean":
                result /= _group.world_size
        return result if scale == 1.0 else result * scale

    return recursively_apply(one, tensor, error_on_other_type=True)


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Pad the tensors of all processes to the largest size of one dimension.

    Args:
        tensor: A structure of tensors that differ between processes in dimension `dim` alone.
        dim: The dimension to pad. Tensors that have fewer dimensions are left as they are.
        pad_index: The value to pad with.
        pad_first: Whether to pad at the beginning.
    """
    collectives = _collectives("pad_across_processes")
    if collectives is None:
        return tensor

    def one(leaf: torch.Tensor) -> torch.Tensor:
        if dim >= leaf.ndim or dim < -leaf.ndim:
            return leaf
        own = leaf.shape[dim]
        largest = int(collectives.all_reduce(torch.tensor([own], device=leaf.device), "max"))
        if largest == own:
            return leaf
        shape = list(leaf.shape)
        shape[dim] = largest
        padded = leaf.new_full(shape, pad_index)
        padded.narrow(dim, largest - own if pad_first else 0, own).copy_(leaf)
        return padded

    return recursively_apply(one, tensor, error_on_other_type=True)


def wait_for_everyone() -> None:
    """Wait until every process has come here."""
    collectives = _collectives("wait_for_everyone")
    if collectives is not None:
        collectives.barrier()


def _checked(operation: str, tensor: Any) -> Collectives | None:
    """Return the collectives; in debug mode, first compare shapes and dtypes across processes."""
    collectives = _collectives(operation)
    if collectives is not None and _group.debug:
        shapes = collectives.all_gather_object(describe(tensor))
        if any(other != shapes[0] for other in shapes):
            listed = "\n".join(f"    rank {rank}: {shape}" for rank, shape in enumerate(shapes))
            raise OperationError(
                f"{operation} needs tensors of the same shapes and dtypes on every process",
                found=f"\n{listed}",
                hint="pad_across_processes(tensor, dim=...) before it",
            )
    return collectives
