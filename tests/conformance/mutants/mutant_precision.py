"""Precisions over float16 with loss scaling, each wrong in one way."""

from __future__ import annotations

import contextlib

import torch
from torchport.builtin.precisions import Float16


class SteadyPrecision(Float16):
    """Right."""


class StaysFloat32(Float16):
    def forward_context(self, context, options=None):
        return contextlib.nullcontext


class BindsNothing(Float16):
    def apply(self, model, context):
        return model


class NotRestored(Float16):
    def restore(self, model) -> None:
        pass


class StateForgotten(Float16):
    def load_state_dict(self, state) -> None:
        pass


class CutsGradients(Float16):
    def apply(self, model, context):
        model[0].weight.requires_grad_(False)
        return super().apply(model, context)


class _StaysScaled(torch.amp.GradScaler):
    def unscale_(self, optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.get_scale())
        super().unscale_(optimizer)


class NeverUnscales(Float16):
    """Clips gradients that are still scaled."""

    def open(self, context) -> None:
        self.scaler = _StaysScaled(context.device.type, init_scale=1024.0)
