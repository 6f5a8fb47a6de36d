"""Compile models with `torch.compile`: whole, or the blocks that repeat once for all.

Models are compiled in place (`torch.nn.Module.compile`): class, identity and names of parameters stay, so that
checkpoints, strategies and `isinstance` do not see a difference.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from torchport import aliases
from torchport.config import schema
from torchport.config.dynamo import TorchDynamoPlugin
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.plugin.backend import Backend

_CALL = "_compiled_call_impl"
"""Where PyTorch keeps what a module compiled in place calls."""

_CODE: dict[type[torch.nn.Module], types.CodeType] = {}
"""For each class of PyTorch's own modules that repeat, the code that is compiled for all of them."""

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


def settle(plugin: TorchDynamoPlugin | None, backend: Any, device: Backend) -> TorchDynamoPlugin | None:
    """Return how models are compiled: as an argument says, then as the environment does.

    Args:
        plugin: The argument `dynamo_plugin`.
        backend: The argument `dynamo_backend`.
        device: The backend of the run.

    Returns:
        The settings, complete; `None` if nothing is to be compiled.

    Raises:
        ConfigurationError: if the two arguments disagree, or PyTorch has no such compiler.
        UnsupportedOperationError: if PyTorch cannot compile for the device.
    """
    if backend is not None and plugin is not None:
        raise ConfigurationError(
            "dynamo_backend and dynamo_plugin are both given",
            hint="give one: dynamo_plugin=TorchDynamoPlugin(backend=...)",
        )
    environ = schema.from_environment(TorchDynamoPlugin, aliases.translate_environment(os.environ))
    if plugin is None and backend is None and environ.get("backend") is None:
        return None
    plugin = plugin if plugin is not None else TorchDynamoPlugin(backend=backend)
    missing = {name: value for name, value in environ.items() if getattr(plugin, name) is None}
    if plugin.options is not None:
        missing.pop("mode", None)  # PyTorch takes one of the two
    plugin = dataclasses.replace(plugin, **missing)
    if plugin.backend is None:
        plugin = dataclasses.replace(plugin, backend=device.compile_backend())
    if plugin.backend == "no":
        return None
    _check(plugin)
    if not device.capabilities().compile:
        raise UnsupportedOperationError(
            f"prepared models are to be compiled with {plugin.backend!r}",
            found=f"the backend {device.spec.name!r}, for which torch.compile has no compiler",
            hint='dynamo_backend="no"',
        )
    return plugin


def _check(plugin: TorchDynamoPlugin) -> None:
    """Refuse now what `torch.compile` would refuse in the first forward."""
    if isinstance(plugin.backend, str):
        known = torch._dynamo.list_backends(exclude_tags=())
        if plugin.backend not in known:
            raise ConfigurationError(
                f"torch.compile has no backend {plugin.backend!r}",
                found=", ".join(torch._dynamo.list_backends()),
                hint=schema.suggest(plugin.backend, known)
                or "python -c 'import torch; print(torch.compiler.list_backends())'",
            )
    if plugin.mode is not None and plugin.options is not None:
        raise ConfigurationError(
            f"TorchDynamoPlugin has mode={plugin.mode!r} and options={plugin.options!r}",
            reason="a mode stands for a set of options",
            hint="give one of the two",
        )


def compile_model(model: torch.nn.Module, plugin: TorchDynamoPlugin | None) -> torch.nn.Module:
    """Compile a model in place as settled; one that is compiled already stays as it is.

    Args:
        model: The model; what `torch.compile(model)` returned counts as the model that was given to it.
        plugin: The settings; `None` compiles nothing.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        inner: torch.nn.Module = model._orig_mod
        if getattr(inner, _CALL, None) is None:
            inner.__dict__[_CALL] = model.dynamo_ctx(inner._call_impl)
        return inner
    if plugin is None or is_compiled_module(model) or has_compiled_regions(model):
        return model
    if plugin.use_regional_compilation:
        _compile_blocks(model, plugin.to_kwargs())
    else:
        _compile(model, plugin.to_kwargs())
    return model


def compile_regions(module: torch.nn.Module, **compile_kwargs: Any) -> torch.nn.Module:
    """Compile the blocks that repeat in a model once for all, instead of the model as a whole.

    A block repeats if a `ModuleList`, `ModuleDict` or `Sequential` holds several modules of its class.
    PyTorch compiles the first of them, and reuses its code for the others. The largest modules that hold no such
    blocks are compiled as they are, such as the head of a transformer. A model without any is compiled as a whole.

    Args:
        module: The model. It is left as it is.
        **compile_kwargs: Arguments of `torch.compile`.

    Returns:
        A model of the same class over the same parameters, under the same names.
    """
    regions = _view(module)
    _compile_blocks(regions, compile_kwargs)
    return regions


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Whether a module is compiled as a whole, by `torch.compile(module)` or `module.compile()`."""
    return isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, _CALL, None) is not None


def has_compiled_regions(module: torch.nn.Module) -> bool:
    """Whether a module is not compiled as a whole, but modules inside of it are."""
    return not is_compiled_module(module) and any(
        is_compiled_module(inner) for inner in module.modules() if inner is not module
    )


def without_compile(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model of the same class over the same parameters that is not compiled; it may be the model itself."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return without_compile(model._orig_mod)
    if not is_compiled_module(model) and not has_compiled_regions(model):
        return model
    return _view(model)


def _compile(module: torch.nn.Module, kwargs: Mapping[str, Any], *, shared: bool = False) -> None:
    """Compile a module in place.

    PyTorch compiles the code of `forward`, and leaves code of its own modules alone: these get a function around
    them. What is compiled belongs to a function's code, so that `shared` modules of a class have one in common.
    """
    if not type(module).forward.__module__.startswith("torch.nn."):
        module.compile(**kwargs)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    own = call.__code__.replace()
    call.__code__ = _CODE.setdefault(type(module), own) if shared else own
    module.__dict__[_CALL] = torch.compile(call, **kwargs)


def _blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the members of a container whose class occurs several times in it, but for PyTorch's plain layers."""
    if not isinstance(module, _CONTAINERS):
        return []
    children = list(module.children())
    counts = Counter(type(child) for child in children)
    return [child for child in children if counts[type(child)] > 1 and not _is_layer(child)]


def _is_layer(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _compile_blocks(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Compile the blocks that repeat anywhere in a module, and what lies beside them."""
    never_called = isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
    if not never_called and not any(_blocks(inner) for inner in module.modules()):
        _compile(module, kwargs)
        return
    repeated = {id(block) for block in _blocks(module)}
    for child in module.children():
        if id(child) in repeated:
            _compile(child, kwargs, shared=True)
        elif any(True for _ in child.parameters()):
            _compile_blocks(child, kwargs)


def _view(module: torch.nn.Module, seen: dict[int, torch.nn.Module] | None = None) -> torch.nn.Module:
    """Return a copy of the modules of a model, uncompiled, over the same parameters and buffers."""
    seen = {} if seen is None else seen
    known = seen.get(id(module))
    if known is not None:
        return known
    view = seen[id(module)] = copy.copy(module)  # a copy shares the tables of parameters and buffers
    view.__dict__.pop(_CALL, None)
    view._modules = {
        name: None if child is None else _view(child, seen) for name, child in module._modules.items()
    }
    forward = view.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        view.__dict__["forward"] = types.MethodType(forward.__func__, view)
    return view
