"""Parameters that become sharded: given memory, made equal on all processes, and followed by optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

_SUCCESSOR = "_torchport_sharded"
"""Attribute of a parameter that was sharded: what took its place in the model."""


def is_low_precision(parameter: torch.Tensor) -> bool:
    """Whether an optimizer would lose small updates of this parameter."""
    return parameter.dtype in (torch.float16, torch.bfloat16)


def upcast_trainable(model: torch.nn.Module) -> int:
    """Hold trainable 16-bit parameters in float32, for the optimizer; return how many there were."""
    found = {id(p): p for p in model.parameters() if p.requires_grad and is_low_precision(p)}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return len(found)


def own_tensors(module: torch.nn.Module, done: set[int]) -> list[torch.Tensor]:
    """Return the parameters and buffers of a unit that no unit inside it has taken, and take them."""
    found = []
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in done:
            done.add(id(tensor))
            found.append(tensor)
    return found


def materialise(
    module: torch.nn.Module,
    tensors: Iterable[torch.Tensor],
    device: torch.device,
    *,
    from_main: bool,
    init: Callable[[torch.nn.Module], Any] | None = None,
) -> None:
    """Give tensors on the meta device memory, and all of them the values of rank 0.

    Tensors keep their identity, so that tied ones stay tied.

    Args:
        module: The unit that they belong to.
        tensors: Its parameters and buffers.
        device: Where they get memory.
        from_main: Whether all processes take the values of rank 0.
        init: Called with each module that got memory, where it is given.
    """
    tensors = list(tensors)
    empty = {id(tensor) for tensor in tensors if tensor.is_meta}
    for tensor in tensors:
        if tensor.is_meta:
            fresh = torch.empty_like(tensor, device=device)
            torch.utils.swap_tensors(tensor, _as_kind(fresh, tensor))  # type: ignore[no-untyped-call]
    if init is not None and empty:
        for part in module.modules():
            if any(id(t) in empty for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
                init(part)
    if from_main:
        for tensor in tensors:
            copy_from_main(tensor, device)


def _as_kind(fresh: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(like, torch.nn.Parameter):
        made = torch.nn.Parameter(fresh, requires_grad=like.requires_grad)
        made.__dict__.update(like.__dict__)
        return made
    return fresh


def copy_from_main(tensor: torch.Tensor, device: torch.device) -> None:
    """Give a tensor the values that it has on rank 0; the exchange runs on `device`."""
    if dist.get_world_size() == 1 or not tensor.numel():
        return
    values = tensor.detach()
    if isinstance(values, DTensor):
        return  # spread over processes by the user
    moved = values.to(device).contiguous()
    dist.broadcast(moved, src=0)
    if moved.data_ptr() != values.data_ptr():
        values.copy_(moved)


def place_ignored(ignored: Iterable[torch.nn.Parameter], device: torch.device) -> None:
    """Move parameters that are not sharded to the device."""
    for parameter in ignored:
        if parameter.device != device:
            parameter.data = parameter.data.to(device)


def average_ignored(ignored: Iterable[torch.nn.Parameter], synchronizes: Callable[[], bool]) -> None:
    """Average the gradients of parameters that are not sharded, as those of all others are.

    Args:
        ignored: The parameters.
        synchronizes: Returns whether a backward exchanges gradients now.
    """
    world = dist.get_world_size()

    def average(parameter: torch.Tensor) -> None:
        if parameter.grad is not None and synchronizes():
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world)

    for parameter in ignored:
        if parameter.requires_grad and world > 1:
            parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]


class Successors:
    """Notes which parameter took the place of which, while units are being sharded.

    The memory of a parameter that was replaced is given up at once, though an optimizer may still hold it: what is
    in use at any time is what it would be with an optimizer made afterwards.
    """

    def __init__(self, keep: Iterable[torch.Tensor] = ()) -> None:
        self._kept = {id(tensor) for tensor in keep}

    def shard(self, module: torch.nn.Module, how: Callable[[], Any]) -> None:
        """Run `how`, which shards the parameters of a module, and note what became of each."""
        places = [
            (part, name, parameter)
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None and id(parameter) not in self._kept
        ]
        how()
        for part, name, before in places:
            after = part._parameters[name]
            if after is None or after is before or hasattr(before, _SUCCESSOR):
                continue
            setattr(before, _SUCCESSOR, after)
            before.data = torch.empty(0, dtype=before.dtype, device=before.device)


def switch_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that was made before its model was sharded go on with the sharded parameters.

    Its groups, settings and state stay; tensors of the state that have a parameter's shape are sharded like it.
    """
    state: Any = optimizer.state
    for group in optimizer.param_groups:
        for index, before in enumerate(group["params"]):
            after = successor(before)
            if after is before:
                continue
            group["params"][index] = after  # in place: some optimizers hold the same list
            if before in state:
                state[after] = {slot: shard_like(value, after) for slot, value in state.pop(before).items()}


def successor(parameter: torch.Tensor) -> torch.Tensor:
    """Return what took the place of a parameter, or the parameter itself."""
    after: torch.Tensor = getattr(parameter, _SUCCESSOR, parameter)
    return after


def shard_like(value: Any, parameter: torch.Tensor) -> Any:
    """Return this process's part of a whole tensor, if it has the shape of a sharded parameter."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape or isinstance(value, DTensor):
        return value
    return part_of(value, parameter.device_mesh, parameter.placements)


def part_of(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """Return a `DTensor` of a whole tensor that is the same on all processes; nothing is exchanged.

    The part has memory of its own, so that the whole can be given up.
    """
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part = same.redistribute(placements=placements)
    local = part.to_local()
    if local.untyped_storage().nbytes() > local.nbytes:
        return DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return part


def gather_spread(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """Put whole parameters in the place of those that are still spread when their unit is gathered.

    Returns:
        The module, the name and the parameter that was there, of each.
    """
    held = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    replaced: list[tuple[torch.nn.Module, str, Any]] = [one for one in held if is_spread(one[2])]
    for module, name, parameter in replaced:
        whole = parameter.detach().full_tensor()
        module._parameters[name] = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return replaced


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor; call it on every process that holds a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()  # with gradients, a new view would be returned each time
def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: the same object each time, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
