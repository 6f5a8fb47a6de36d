"""The documented utilities around FSDP, under the names that users know."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchport_fsdp.config import FullyShardedDataParallelPlugin
from torchport_fsdp.parameters import part_of
from torchport_fsdp.states import reshard
from torchport_fsdp.wrapping import inner_first, units

_VARIABLE = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def enable_fsdp_ram_efficient_loading() -> None:
    """Let accelerators made from now on hold models in the memory of rank 0 only, before they are sharded."""
    os.environ[_VARIABLE] = "True"


def disable_fsdp_ram_efficient_loading() -> None:
    """Undo `enable_fsdp_ram_efficient_loading`."""
    os.environ[_VARIABLE] = "False"


def fsdp2_prepare_model(accelerator: Any, model: torch.nn.Module) -> torch.nn.Module:
    """Shard a model; the same as `accelerator.prepare_model(model)`."""
    prepared: torch.nn.Module = accelerator.prepare_model(model)
    return prepared


def fsdp2_prepare_auto_wrap_policy(
    fsdp2_plugin: FullyShardedDataParallelPlugin, model: torch.nn.Module
) -> Callable[[torch.nn.Module], bool] | None:
    """Return a function that says of each module of `model` whether it becomes a unit; `None` if none does."""
    chosen = units(model, fsdp2_plugin)
    return (lambda module: any(module is one for one in chosen)) if chosen else None


def fsdp2_switch_optimizer_parameters(
    optimizer: torch.optim.Optimizer, mapping: Mapping[Any, torch.Tensor]
) -> None:
    """Let an optimizer go on with other parameters; `prepare` does so by itself.

    Args:
        optimizer: The optimizer.
        mapping: The new parameters, by the old one or by its `data_ptr()`.

    Raises:
        KeyError: if a parameter of the optimizer has no successor.
    """
    for group in optimizer.param_groups:
        for index, before in enumerate(group["params"]):
            after = mapping[before] if before in mapping else mapping[before.data_ptr()]
            group["params"][index] = after
            if before in optimizer.state:
                optimizer.state[after] = optimizer.state.pop(before)


def get_module_children_bottom_up(model: torch.nn.Module, return_fqns: bool = False) -> list[Any]:
    """Return the modules of a model, children before their parents and the model last; each once.

    Args:
        model: The model.
        return_fqns: Whether to return pairs of a module's name and the module.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = list(inner_first(model))
    return [(names[id(module)], module) for module in modules] if return_fqns else modules


@torch.no_grad()
def fsdp2_load_full_state_dict(
    accelerator: Any, model: torch.nn.Module, full_sd: Mapping[str, torch.Tensor]
) -> None:
    """Load a whole state that only rank 0 has into a sharded model; call it on every process.

    One tensor at a time is sent, so that no other process ever holds more than the largest one.

    Args:
        accelerator: The accelerator of the run.
        model: A model that has been prepared.
        full_sd: On rank 0, the whole state; elsewhere it is not read.

    Raises:
        RuntimeError: on rank 0, if a tensor is missing or has another shape.
    """
    reshard(model)
    device = accelerator.device
    for name, held in model.state_dict().items():
        if dist.get_rank() == 0:
            if name not in full_sd or full_sd[name].shape != held.shape:
                raise RuntimeError(f"the state does not fit the model at {name}")
            whole = full_sd[name].detach().to(device, held.dtype).contiguous()
        else:
            whole = torch.empty(held.shape, dtype=held.dtype, device=device)
        dist.broadcast(whole, src=0)
        if isinstance(held, DTensor):
            held.to_local().copy_(part_of(whole, held.device_mesh, held.placements).to_local())
        else:
            held.copy_(whole)
