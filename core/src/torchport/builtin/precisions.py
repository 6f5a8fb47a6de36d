"""The core's precisions: full, and `torch.autocast` to a 16-bit format."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchport.config.kwargs import AutocastKwargs, GradScalerKwargs, first_of
from torchport.ops.pytree import convert_to_fp32
from torchport.plugin.context import RunContext
from torchport.plugin.precision import Precision


class FullPrecision(Precision):
    """Every tensor keeps its own dtype; the model is left as it is."""

    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Return the model itself."""
        return model


class Autocast(Precision):
    """Forward passes run under `torch.autocast`; their results are given back in float32."""

    dtype: torch.dtype

    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Bind the model's `forward` to the autocast context."""
        forward = model.forward
        cast = self.forward_context(context)

        @functools.wraps(forward)
        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with cast():
                outputs = forward(*args, **kwargs)
            return convert_to_fp32(outputs)

        model.forward = autocast_forward
        return model

    def restore(self, model: torch.nn.Module) -> None:
        """Give the model its own `forward` back."""
        own = getattr(model.__dict__.get("forward"), "__wrapped__", None)
        if own is None:
            return
        if getattr(own, "__func__", None) is type(model).forward:
            del model.forward
        else:
            model.forward = own

    def forward_context(
        self, context: RunContext, options: Any = None
    ) -> Callable[[], AbstractContextManager[Any]]:
        """Return a factory of `torch.autocast` contexts of the backend's device."""
        handler = options if options is not None else first_of(context.handlers, AutocastKwargs)
        return functools.partial(context.backend.autocast, self.dtype, **handler.to_kwargs())


class BFloat16(Autocast):
    """Autocast to bfloat16."""

    dtype = torch.bfloat16


class Float16(Autocast):
    """Autocast to float16, with a scaled loss so that small gradients do not vanish."""

    dtype = torch.float16

    def open(self, context: RunContext) -> None:
        """Make the loss scaler."""
        options = first_of(context.handlers, GradScalerKwargs).to_kwargs()
        self.scaler = context.backend.grad_scaler(**options)
