"""The callables of a step as most strategies need them: PyTorch's own, with loss scaling where it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torchport.plugin.backend import Backend
from torchport.plugin.strategy import Prepared, PrepareRequest


def _no_context(model: torch.nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


def bind_step(
    request: PrepareRequest,
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    *,
    no_sync: Callable[[torch.nn.Module], AbstractContextManager[Any]] = _no_context,
    clip_grad_norm: Callable[
        [Iterable[torch.Tensor], float, float], torch.Tensor
    ] = torch.nn.utils.clip_grad_norm_,
) -> Prepared:
    """Bind a step for a strategy whose models are ordinary modules.

    Args:
        request: What `Strategy.prepare` was given.
        models: The wrapped models.
        optimizers: The wrapped optimizers; by default those of the request.
        no_sync: A context in which a model's gradients stay local.
        clip_grad_norm: Clips by total norm, where the norm needs communication.
    """
    chosen = tuple(request.optimizers if optimizers is None else optimizers)
    backend, precision = request.context.backend, request.context.precision

    def gradients() -> list[torch.Tensor]:
        owned = [p for model in models for p in model.parameters()]
        owned += [p for optimizer in chosen for group in optimizer.param_groups for p in group["params"]]
        return list({id(p): p.grad for p in owned if p.grad is not None}.values())

    def zero_grad(optimizer: torch.optim.Optimizer, set_to_none: bool) -> None:
        optimizer.zero_grad(set_to_none)

    def plain_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        optimizer.step() if closure is None else optimizer.step(closure)
        return True

    def backend_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        backend.optimizer_step(optimizer, closure)
        return True

    step = plain_step if type(backend).optimizer_step is Backend.optimizer_step else backend_step

    if precision.scaler is not None:
        precision.scaling = precision.scaling or ScaledStep(precision.scaler)
        precision.scaling.add(chosen)
    scaled = precision.scaling
    return Prepared(
        models=tuple(models),
        optimizers=chosen,
        backward=torch.Tensor.backward if scaled is None else scaled.backward,
        step=step if scaled is None else scaled.step,
        zero_grad=zero_grad,
        no_sync=no_sync,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=torch.nn.utils.clip_grad_value_,
        gradients=gradients,
        unscale_gradients=_nothing_to_unscale if scaled is None else scaled.unscale,
    )


def _nothing_to_unscale(optimizer: torch.optim.Optimizer | None) -> None:
    """Gradients carry no loss scale."""


class ScaledStep:
    """Backward, unscale and step under a loss scaler, for one or several optimizers.

    The scale is updated once for each round, after the last optimizer has stepped (or before the next backward),
    so that all optimizers of a round divide by the same scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.applied: dict[int, bool] = {}
        self.unscaled: set[int] = set()
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def add(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take part in the steps of further optimizers."""
        for optimizer in optimizers:
            if id(optimizer) not in self.optimizers:
                self.optimizers[id(optimizer)] = optimizer
                optimizer.register_step_post_hook(self._note_applied)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of the scaled loss."""
        if self.applied:  # some optimizer did not take part in the last round
            self._update()
        torch.autograd.backward(self.scaler.scale(loss), **kwargs)

    def unscale(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Divide the scale out of the gradients of one optimizer, or of all; once in a round."""
        for key, candidate in self.optimizers.items():
            if (optimizer is None or candidate is optimizer) and key not in self.unscaled:
                self.scaler.unscale_(candidate)
                self.unscaled.add(key)

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        """Step unless a gradient overflowed; return whether the step was applied."""
        if closure is not None:
            raise RuntimeError(
                "a loss scaler takes no closure: use precision 'no' or 'bf16' with this optimizer"
            )
        self.applied[id(optimizer)] = False
        self.scaler.step(optimizer)
        applied = self.applied[id(optimizer)]
        if len(self.applied) == len(self.optimizers):
            self._update()
        return applied

    def _note_applied(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by the scaler on fused optimizers
        self.applied[id(optimizer)] = found_inf is None or not bool(found_inf)

    def _update(self) -> None:
        self.scaler.update()
        self.applied.clear()
        self.unscaled.clear()
