"""Tensor parallelism: which modules are spread over processes, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchport.errors import ConfigurationError
from torchport.plugin import ParallelismConfig

from torchport_fsdp.common import plain_name

STYLES: Mapping[str, Any] = {
    "colwise": ColwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_seq": lambda: ColwiseParallel(input_layouts=Shard(1)),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_seq": lambda: RowwiseParallel(output_layouts=Shard(1)),
    "sequence_parallel": SequenceParallel,
}
"""Styles by name: by columns (output features), by rows (input features), or along the sequence.

`_rep`: what is not spread is made or taken whole on every process; `_seq`: it is spread along the sequence.
"""

Styles = dict[int, tuple[str, torch.nn.Module, ParallelStyle]]
"""By the identity of a module: its name, itself, and its style."""


def styles_of(model: torch.nn.Module, parallelism: ParallelismConfig) -> Styles:
    """Return the style of each module that a plan names: the one given, or the model's own.

    Raises:
        ConfigurationError: if there is no plan, or it names an unknown style or, being given, a missing module.
    """
    if not parallelism.tp_enabled:
        return {}
    given = parallelism.tp_plan
    plan = given or _own_plan(model)
    named = {plain_name(name + "."): module for name, module in model.named_modules() if name}
    named = {name.removesuffix("."): module for name, module in named.items()}
    found: Styles = {}
    for pattern, value in plan.items():
        matched = [name for name in named if _matches(pattern, name)]
        if given and not matched:
            raise ConfigurationError(
                f"the tensor-parallel plan names {pattern!r}, and the model has no such module",
                found=", ".join(list(named)[:8]) + ", ...",
                hint="whole names of modules; * stands for one part of a name: layers.*.attention.q_proj",
            )
        for name in matched:
            found[id(named[name])] = (name, named[name], _style(value, pattern))
    if not found:
        raise ConfigurationError(
            f"tp_size={parallelism.tp_size} needs to know how the layers of {type(model).__name__} are spread",
            found="no plan was given, and the model has none of its own (tp_plan, _tp_plan)",
            hint="tp_handler=TorchTensorParallelConfig(plan={'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'})",
        )
    _check_ties(model, found)
    _check_widths(found, parallelism.tp_size)
    return found


def _own_plan(model: torch.nn.Module) -> dict[str, Any]:
    """Return the plans of a model and of modules inside it, under the model's own names; the outer ones win."""
    plan: dict[str, Any] = {}
    for prefix, module in reversed(list(model.named_modules())):
        own = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
        if isinstance(own, Mapping):
            dotted = plain_name(f"{prefix}.") if prefix else ""
            plan |= {f"{dotted}{pattern}": value for pattern, value in own.items()}
    return plan


def _matches(pattern: str, name: str) -> bool:
    parts = (re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split("."))
    return re.fullmatch(r"\.".join(parts), name) is not None


def _style(value: Any, pattern: str) -> ParallelStyle:
    if isinstance(value, ParallelStyle):
        return value
    name = str(value).strip().lower()
    if name not in STYLES:
        raise ConfigurationError(
            f"the tensor-parallel plan gives {pattern!r} the style {value!r}",
            hint=f"one of {', '.join(STYLES)}, or a torch.distributed.tensor.parallel.ParallelStyle",
        )
    style: ParallelStyle = STYLES[name]()
    return style


def _check_ties(model: torch.nn.Module, styles: Styles) -> None:
    """Refuse to spread a parameter that another module shares: each would have its own afterwards."""
    owners: dict[int, list[torch.nn.Module]] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for key, modules in owners.items():
        laid_out = [styles[id(module)][0] for module in modules if id(module) in styles]
        if len(modules) > 1 and laid_out:
            raise ConfigurationError(
                f"the tensor-parallel plan spreads {laid_out[0]!r}, whose parameter {names[key]!r} is tied",
                reason="the modules that share it would each have their own",
                hint="leave the modules with tied parameters out of the plan",
            )


def _check_widths(styles: Styles, size: int) -> None:
    """Refuse layers whose features cannot be divided evenly: heads would be cut."""
    for name, module, style in styles.values():
        if not isinstance(module, torch.nn.Linear):
            continue
        by_rows = isinstance(style, RowwiseParallel)
        width = module.in_features if by_rows else module.out_features
        if isinstance(style, (ColwiseParallel, RowwiseParallel)) and width % size:
            raise ConfigurationError(
                f"the {'input' if by_rows else 'output'} features of {name!r} cannot be spread over tp_size={size}",
                found=f"{width} features",
                hint="a tp_size that divides them, or leave the module out of the plan",
            )


def spread(unit: torch.nn.Module, styles: Styles, mesh: DeviceMesh) -> None:
    """Spread the modules of a unit that a plan names, each once; their parameters become `DTensor`s."""
    for module in list(unit.modules()):
        named = styles.pop(id(module), None)
        if named is not None:
            parallelize_module(module, mesh, named[2])
