"""The precision `fp8`: linear layers in 8 bits by an engine, everything else under autocast to bfloat16."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torchport.builtin.precisions import BFloat16, restore_forward
from torchport.plugin import PrecisionSpec, RunContext

from torchport_fp8.check import emulates
from torchport_fp8.config import FP8Engine, FP8RecipeKwargs


class Engine(Protocol):
    """A library that computes in 8 bits."""

    def convert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Let a model compute in 8 bits, over the same parameters under the same names."""
        ...

    def revert(self, model: torch.nn.Module) -> None:
        """Take back what `convert` did to a model."""
        ...


class Float8Precision(BFloat16):
    """Linear layers in 8 bits, everything else under autocast to bfloat16; results are given back in float32."""

    def __init__(self, spec: PrecisionSpec, config: FP8RecipeKwargs | None = None) -> None:
        super().__init__(spec, config or FP8RecipeKwargs())
        self._engine: Engine | None = None
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def open(self, context: RunContext) -> None:
        """Build the engine for the device of the run."""
        super().open(context)
        self._engine = make_engine(self.config, context)

    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Convert the model's linear layers and bind its `forward` to autocast.

        Parameters stay the same objects under the same names. Call it before the model is distributed.
        """
        self._engine = self._engine or make_engine(self.config, context)
        restore_forward(model)  # before the engine binds it: the binding of an earlier run
        converted = super().apply(self._engine.convert(model), context)
        self._models.add(converted)
        return converted

    def restore(self, model: torch.nn.Module) -> None:
        """Give the model its own `forward` and ordinary layers back."""
        super().restore(model)
        if self._engine is not None:
            self._engine.revert(model)

    def convert_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer itself, which computes the scales of gathered weights after each step if asked to."""
        if self.config.precompute_float8_dynamic_scale_for_fsdp:
            from torchport_fp8.ao import precompute_scales

            models = self._models

            def precompute(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                for model in models:
                    precompute_scales(model)

            optimizer.register_step_post_hook(precompute)
        return optimizer


def make_engine(settings: FP8RecipeKwargs, context: RunContext) -> Engine:
    """Build the engine that the settings name; that it can be had has been checked with the plan."""
    if settings.backend is FP8Engine.TE:
        from torchport_fp8.te import TransformerEngine

        return TransformerEngine(settings)
    from torchport_fp8.ao import TorchaoEngine

    features = context.backend.capabilities().features
    announce = context.topology.rank == 0
    return TorchaoEngine(settings, emulates(settings, features), context.device, announce=announce)
