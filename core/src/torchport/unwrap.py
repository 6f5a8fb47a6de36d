"""The user's own model inside a wrapped, compiled or autocast one."""

from __future__ import annotations

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torchport.builtin.precisions import restore_forward
from torchport.training.compile import without_compile


def extract_model_from_parallel(
    model: torch.nn.Module,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> torch.nn.Module:
    """Return the user's model inside its wrappers; `Accelerator.unwrap_model` knows those of every strategy.

    Args:
        model: The model.
        keep_fp32_wrapper: Whether its `forward` stays bound to the precision; if not, it can be pickled again.
        keep_torch_compile: Whether it stays compiled.
        recursive: Whether wrappers of modules inside the model are taken off too, in place.

    Returns:
        The model; where it is compiled and is not to stay so, another one over the same parameters.
    """
    inner = _plain(model)
    if recursive:
        for parent in inner.modules():
            for name, child in parent.named_children():
                setattr(parent, name, _plain(child))
    return finish(model, inner, keep_fp32_wrapper, keep_torch_compile)


def finish(
    wrapped: torch.nn.Module, inner: torch.nn.Module, keep_fp32_wrapper: bool, keep_torch_compile: bool
) -> torch.nn.Module:
    """Unbind an unwrapped model from its precision and its compiler, as asked for.

    Args:
        wrapped: The model with its wrappers.
        inner: The model without them.
        keep_fp32_wrapper: As for `extract_model_from_parallel`.
        keep_torch_compile: As for `extract_model_from_parallel`.
    """
    if not keep_fp32_wrapper:
        restore_forward(inner)
    if not keep_torch_compile:
        return without_compile(inner)
    if isinstance(wrapped, torch._dynamo.OptimizedModule):  # compiled around its wrappers
        return (
            wrapped
            if wrapped._orig_mod is inner
            else torch._dynamo.OptimizedModule(inner, wrapped.dynamo_ctx)
        )
    return inner


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        else:
            return model
