"""The core's precisions: full, and `torch.autocast` to a 16-bit format."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchport.config.kwargs import AutocastKwargs, GradScalerKwargs, first_of
from torchport.ops.pytree import convert_to_fp32
from torchport.plugin.context import RunContext
from torchport.plugin.precision import Precision

_MARK = "_torchport_forward"


def restore_forward(model: torch.nn.Module) -> None:
    """Give a model that `Autocast.apply` has bound its own `forward` back; leave any other as it is."""
    bound = model.__dict__.get("forward")
    own = getattr(bound, _MARK, None)  # a bound method shows the attributes of its function
    if own is None:
        return
    if own is type(model).forward:
        del model.forward
    else:
        model.forward = types.MethodType(own, model) if isinstance(bound, types.MethodType) else own


class FullPrecision(Precision):
    """Every tensor keeps its own dtype."""

    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Return the model itself, no longer bound to the precision of an earlier run."""
        restore_forward(model)
        return model


class Autocast(Precision):
    """Forward passes run under `torch.autocast`; their results are given back in float32."""

    dtype: torch.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of autocast."""
        return self.dtype

    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Bind the model's `forward` to the autocast context, and to no earlier one."""
        restore_forward(model)
        forward: Callable[..., Any] = model.forward
        cast = self.forward_context(context)
        if isinstance(forward, types.MethodType) and forward.__self__ is model:
            function = forward.__func__

            @functools.wraps(function)
            def autocast_method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
                with cast():
                    outputs = function(self, *args, **kwargs)
                return convert_to_fp32(outputs)

            autocast_method.__dict__[_MARK] = function
            model.forward = types.MethodType(autocast_method, model)  # a copy of the model binds it anew
            return model

        @functools.wraps(forward)
        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with cast():
                outputs = forward(*args, **kwargs)
            return convert_to_fp32(outputs)

        autocast_forward.__dict__[_MARK] = forward
        model.forward = autocast_forward
        return model

    def restore(self, model: torch.nn.Module) -> None:
        """Give the model its own `forward` back."""
        restore_forward(model)

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
