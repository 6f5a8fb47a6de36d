"""States of models and optimizers with sharded parameters: whole ones, and each process's part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchport.plugin import shards

from torchport_fsdp.common import plain_name
from torchport_fsdp.parameters import part_of, shard_like, whole_of


def reshard(model: torch.nn.Module) -> None:
    """Give up whole parameters, which a forward without a backward may have left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model_state(model: torch.nn.Module, *, host: bool, main_only: bool) -> dict[str, Any]:
    """Gather the whole state of a model, one tensor at a time; call it on every process.

    Args:
        model: The model.
        host: Whether tensors are moved to host memory.
        main_only: Whether all processes but rank 0 keep nothing.
    """
    reshard(model)
    keep = not main_only or dist.get_rank() == 0
    state = {}
    for name, value in model.state_dict().items():
        whole = _gathered(value, host=host, keep=keep)
        if keep:
            state[name] = whole
    return state


def _gathered(value: Any, *, host: bool, keep: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    whole = whole_of(value.detach())
    if not keep:
        return None
    return whole.to("cpu") if host else whole


def load_whole_model_state(model: torch.nn.Module, state: dict[str, Any]) -> Any:
    """Load a whole state that every process has.

    Raises:
        RuntimeError: if names or shapes do not fit, as `Module.load_state_dict` does.
    """
    reshard(model)
    parts = {}
    own = model.state_dict()
    for name, value in state.items():
        held = own.get(name)
        fits = isinstance(held, DTensor) and isinstance(value, torch.Tensor) and held.shape == value.shape
        parts[name] = _part_like(value, held) if fits and isinstance(held, DTensor) else value
        if isinstance(held, DTensor) and not fits:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(getattr(value, 'shape', ()))} in the state,"
                f" {tuple(held.shape)} in the model"
            )
    return model.load_state_dict(parts)


def _part_like(whole: torch.Tensor, held: DTensor) -> DTensor:
    moved = whole.to(held.to_local().device, held.dtype)
    return part_of(moved, held.device_mesh, held.placements)


@torch.no_grad()
def copy_whole(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set parameters from whole ones that are the same on all processes."""
    for name, parameter in model.named_parameters():
        if name not in values:
            continue
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(_part_like(values[name], parameter).to_local())
        else:
            parameter.copy_(values[name])


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, host: bool, main_only: bool) -> dict[str, Any]:
    """Gather the whole state of an optimizer, one tensor at a time; call it on every process."""
    keep = not main_only or dist.get_rank() == 0
    own = optimizer.state_dict()
    gathered = {
        number: {slot: _gathered(value, host=host, keep=keep) for slot, value in slots.items()}
        for number, slots in own["state"].items()
    }
    return {"state": gathered if keep else {}, "param_groups": own["param_groups"]}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state that every process has."""
    parameters = list(numbered(optimizer))
    parts = {
        number: {slot: shard_like(value, parameters[number]) for slot, value in slots.items()}
        for number, slots in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def numbered(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Give the parameters of an optimizer in the order of their numbers in its state."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


# --- parts -----------------------------------------------------------------------------------------------


def model_parts(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a model's state by their names in the user's own model, and the rest."""
    reshard(model)
    named = {plain_name(name): value for name, value in model.state_dict().items()}
    tensors = {n: value.detach() for n, value in named.items() if isinstance(value, torch.Tensor)}
    return tensors, {n: value for n, value in named.items() if n not in tensors}


def save_shards(
    models: Mapping[int, torch.nn.Module], optimizers: Mapping[int, torch.optim.Optimizer], folder: Path
) -> None:
    """Write this process's part of each state; call it on every process."""
    for index, model in models.items():
        tensors, rest = model_parts(model)
        shards.write_shards(tensors, shards.model_folder(folder, index), rest or None)
    for index, optimizer in optimizers.items():
        tensors, rest = shards.split_optimizer_state(optimizer.state_dict())
        shards.write_shards(tensors, shards.optimizer_folder(folder, index), rest)


def load_shards(
    models: Mapping[int, torch.nn.Module], optimizers: Mapping[int, torch.optim.Optimizer], folder: Path
) -> None:
    """Read what this process holds of each state."""
    for index, model in models.items():
        place = shards.model_folder(folder, index)
        tensors, _ = model_parts(model)
        shards.read_shards(tensors, place)  # in place
        rest = shards.read_plain(place)
        if rest:
            model.load_state_dict(rest, strict=False)
    for index, optimizer in optimizers.items():
        _load_optimizer_shards(optimizer, shards.optimizer_folder(folder, index))


def _load_optimizer_shards(optimizer: torch.optim.Optimizer, place: Path) -> None:
    parameters = list(numbered(optimizer))
    tensors = {}
    for name, (shape, dtype) in shards.shapes_of(place).items():
        parameter = parameters[int(name.split(".", 2)[1])]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            tensors[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            device = local.device if shape == parameter.shape else torch.device("cpu")
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
    shards.read_shards(tensors, place)
    optimizer.load_state_dict(shards.join_optimizer_state(tensors, shards.read_plain(place)))
