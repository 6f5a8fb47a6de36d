"""Which modules of a model become units: their parameters are gathered and given up together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchport.errors import ConfigurationError

from torchport_fsdp.config import AutoWrapPolicy, FullyShardedDataParallelPlugin

_COMPILED = "_orig_mod"
_DEFAULT_MIN_NUM_PARAMS = 100_000_000


def units(
    model: torch.nn.Module, config: FullyShardedDataParallelPlugin, ignored: frozenset[int] = frozenset()
) -> list[torch.nn.Module]:
    """Return the modules inside `model` that are units of their own, inner ones before outer ones.

    Args:
        model: The model; itself it is always the outermost unit, and not in the list.
        config: The settings.
        ignored: Identities of parameters that are not sharded and do not count.

    Raises:
        ConfigurationError: if the policy names classes that the model does not have.
    """
    chosen = _policy(model, config)
    if chosen is None:
        return []
    if isinstance(chosen, int):
        return _by_size(model, chosen, ignored)
    found = [
        module
        for module in inner_first(model)
        if module is not model and chosen(module) and not isinstance(module, _CONTAINERS)
    ]
    return [inside(module) for module in found]


_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)
"""Modules that are never called, so that nothing could gather their parameters."""


def _policy(
    model: torch.nn.Module, config: FullyShardedDataParallelPlugin
) -> Callable[[torch.nn.Module], bool] | int | None:
    policy, names = config.auto_wrap_policy, config.transformer_cls_names_to_wrap
    if policy is not None and not isinstance(policy, AutoWrapPolicy):
        return _by_function(policy)
    if policy is None:
        own = getattr(model, "_no_split_modules", None)
        if names or own:
            policy = AutoWrapPolicy.TRANSFORMER_BASED_WRAP
        else:
            policy = AutoWrapPolicy.SIZE_BASED_WRAP if config.min_num_params else AutoWrapPolicy.NO_WRAP
    if policy is AutoWrapPolicy.NO_WRAP:
        return None
    if policy is AutoWrapPolicy.SIZE_BASED_WRAP:
        return _DEFAULT_MIN_NUM_PARAMS if config.min_num_params is None else config.min_num_params
    return _by_class(model, names)


def _by_class(model: torch.nn.Module, names: Iterable[str] | None) -> Callable[[torch.nn.Module], bool]:
    parts = [inside(module) for module in model.modules()]
    there = {type(module).__name__ for module in parts}
    if names:
        missing = sorted(set(names) - there)
        if missing:
            raise ConfigurationError(
                f"the model has no module of the class {', '.join(missing)}",
                found=", ".join(sorted(there - {"ModuleList", "ModuleDict"})),
                hint="--fsdp-transformer-layer-cls-to-wrap with names of its classes",
            )
        wanted = set(names)
    else:
        wanted = {name for module in parts for name in getattr(module, "_no_split_modules", None) or ()}
        wanted &= there
    if not wanted:
        repeated = [
            name for name, count in Counter(type(m).__name__ for m in parts).most_common(4) if count > 1
        ]
        raise ConfigurationError(
            "TRANSFORMER_BASED_WRAP needs to know the classes of the model's blocks",
            found="the model names none itself (_no_split_modules)",
            hint=f"transformer_cls_names_to_wrap=[...]; the model repeats: {', '.join(repeated) or 'nothing'}",
        )
    return lambda module: type(inside(module)).__name__ in wanted


def _by_function(policy: Any) -> Callable[[torch.nn.Module], bool]:
    """Accept a function of a module alone, and PyTorch's policies for the first version."""
    classes: Any = getattr(policy, "_module_classes", None)  # torch.distributed.fsdp.wrap.ModuleWrapPolicy
    if classes is not None:
        return lambda module: isinstance(module, tuple(classes))
    keywords: dict[str, Any] = getattr(policy, "keywords", {})
    classes = keywords.get("transformer_layer_cls") or keywords.get("module_classes") or ()
    if classes:  # functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={...})
        return lambda module: isinstance(module, tuple(classes))
    if "min_num_params" in keywords:
        raise ConfigurationError(
            "size_based_auto_wrap_policy is given as a setting",
            hint="auto_wrap_policy='SIZE_BASED_WRAP', min_num_params=...",
        )
    function: Callable[[torch.nn.Module], bool] = policy
    return function


def _by_size(model: torch.nn.Module, fewest: int, ignored: frozenset[int]) -> list[torch.nn.Module]:
    """Make a unit of each module that has enough parameters besides those of the units inside it."""
    found: list[torch.nn.Module] = []
    taken: set[int] = set(ignored)
    for module in inner_first(model):
        if module is model or isinstance(module, _CONTAINERS):
            continue
        own = {id(parameter): parameter.numel() for parameter in module.parameters()}
        if sum(count for key, count in own.items() if key not in taken) >= max(1, fewest):
            found.append(inside(module))
            taken |= own.keys()
    return found


def inner_first(model: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """Give each module once, its children before it; what `torch.compile` put around one is left out."""
    seen: set[int] = set()

    def visit(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        for child in module.children():
            yield from visit(child)
        if _COMPILED not in module._modules:
            yield module

    return visit(model)


def inside(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside what `torch.compile` put around it."""
    inner = module._modules.get(_COMPILED)
    return module if inner is None else inner


def check_shared(inner: list[torch.nn.Module], model: torch.nn.Module) -> None:
    """Refuse parameters that two units share: sharded twice, they would be two.

    Args:
        inner: The units inside the model, inner ones before outer ones.
        model: The model, the outermost unit.

    Raises:
        ConfigurationError: naming the parameter.
    """
    names: dict[int, str] = {}
    owners: dict[int, torch.nn.Module] = {}
    taken: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for unit in (*inner, model):
        modules = [module for module in unit.modules() if id(module) not in taken]
        taken |= {id(module) for module in modules}
        for module in modules:
            for parameter in module.parameters(recurse=False):
                if owners.setdefault(id(parameter), unit) is not unit:
                    raise ConfigurationError(
                        f"the parameter {names[id(parameter)]!r} is shared by modules of two units",
                        found=f"{type(owners[id(parameter)]).__name__} and {type(unit).__name__}",
                        reason="a unit shards its parameters apart from the others",
                        hint="an auto_wrap_policy that leaves modules with shared parameters to the outermost unit",
                    )


def ignored_parameters(
    model: torch.nn.Module, config: FullyShardedDataParallelPlugin
) -> list[torch.nn.Parameter]:
    """Return the parameters that the settings leave out of sharding.

    Raises:
        ConfigurationError: if a regular expression is not one or matches nothing, or a module is not of the model.
    """
    found: list[torch.nn.Parameter] = []
    for module in _matching(config.ignored_modules, dict(model.named_modules()), "ignored_modules"):
        found += module.parameters()
    found += _matching(config.ignored_params, dict(model.named_parameters()), "ignored_params")
    return list({id(parameter): parameter for parameter in found}.values())


def _matching(asked: Any, named: dict[str, Any], setting: str) -> list[Any]:
    if asked is None:
        return []
    if not isinstance(asked, str):
        own = {id(value) for value in named.values()}
        return [value for value in asked if id(value) in own]  # others may be of another model
    try:
        pattern = re.compile(asked)
    except re.error as error:
        raise ConfigurationError(
            f"{setting}={asked!r} is not a regular expression", reason=str(error)
        ) from error
    matched = [value for name, value in named.items() if name and pattern.fullmatch(name)]
    if not matched:
        raise ConfigurationError(
            f"{setting}={asked!r} matches no name in the model",
            found=", ".join(list(named)[1:6]) + ", ...",
            hint="it must match a whole name",
        )
    return matched
