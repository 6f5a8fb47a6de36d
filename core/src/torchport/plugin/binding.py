"""The callables of a step as most strategies need them: PyTorch's own, with loss scaling where it is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torchport.errors import OperationError
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
    clip_grad_value: Callable[[Iterable[torch.Tensor], float], None] = torch.nn.utils.clip_grad_value_,
    local: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Prepared:
    """Bind a step for a strategy whose models are ordinary modules.

    Args:
        request: What `Strategy.prepare` was given.
        models: The wrapped models.
        optimizers: The wrapped optimizers; by default those of the request.
        no_sync: A context in which a model's gradients stay local.
        clip_grad_norm: Clips by total norm, where the norm needs communication.
        clip_grad_value: Clips each element.
        local: Returns the part of a gradient that this process holds, the same object each time, where gradients
            are spread over processes.
    """
    chosen = tuple(request.optimizers if optimizers is None else optimizers)
    backend, precision = request.context.backend, request.context.precision

    def gradients(of: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
        owned: list[torch.Tensor] = [p for model in of or models for p in model.parameters()]
        if not of:
            owned += [p for optimizer in chosen for p in _parameters(optimizer)]
        found = {id(p): p.grad for p in owned if p.grad is not None}.values()
        return list(found) if local is None else [local(gradient) for gradient in found]

    def backend_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        backend.optimizer_step(optimizer, closure)
        return True

    own_step = type(backend).optimizer_step is not Backend.optimizer_step
    unscaled = Prepared(
        models=tuple(models),
        optimizers=chosen,
        backward=torch.Tensor.backward,
        step=backend_step if own_step else plain_step,
        zero_grad=zero_grad,
        no_sync=no_sync,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        gradients=gradients,
        unscale_gradients=_nothing_to_unscale,
    )
    if precision.scaler is None:
        return unscaled
    scaling = precision.scaling = precision.scaling or ScaledStep(precision.scaler)
    scaling.add(chosen)

    def unscale_and_clip_norm(
        parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float
    ) -> torch.Tensor:
        parameters = list(parameters)
        scaling.unscale_owners(parameters)
        return clip_grad_norm(parameters, max_norm, norm_type)

    def unscale_and_clip_value(parameters: Iterable[torch.Tensor], value: float) -> None:
        parameters = list(parameters)
        scaling.unscale_owners(parameters)
        clip_grad_value(parameters, value)

    return dataclasses.replace(
        unscaled,
        backward=scaling.backward,
        step=scaling.step,
        clip_grad_norm=unscale_and_clip_norm,
        clip_grad_value=unscale_and_clip_value,
        unscale_gradients=scaling.unscale,
    )


def plain_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
    """Step; without a loss scale, every step is applied."""
    optimizer.step() if closure is None else optimizer.step(closure)
    return True


def zero_grad(optimizer: torch.optim.Optimizer, set_to_none: bool) -> None:
    """Clear the gradients of an optimizer's parameters."""
    optimizer.zero_grad(set_to_none)


def _nothing_to_unscale(optimizer: torch.optim.Optimizer | None) -> None:
    """Gradients carry no loss scale."""


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in _parameters(optimizer))


class ScaledStep:
    """Backward, unscale and step under a loss scaler, for one or several optimizers.

    The scale is updated once for each round, after the last optimizer has stepped (or before the next backward),
    so that all optimizers of a round divide by the same scale. While an optimizer that has not stepped yet holds
    gradients, the scale stays as it is.
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
        """Compute gradients of the scaled loss.

        Raises:
            OperationError: if unscaled gradients would be added to scaled ones.
        """
        if self.applied or self.unscaled:
            self._begin_round()
        torch.autograd.backward(self.scaler.scale(loss), **kwargs)

    def unscale(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Divide the scale out of the gradients of one optimizer, or of all; once in a round."""
        for key, candidate in self.optimizers.items():
            if (optimizer is None or candidate is optimizer) and key not in self.unscaled:
                self.scaler.unscale_(candidate)
                self.unscaled.add(key)

    def unscale_owners(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide the scale out of the gradients of the optimizers to which some of the parameters belong."""
        wanted = {id(parameter) for parameter in parameters}
        for optimizer in self.optimizers.values():
            if any(id(parameter) in wanted for parameter in _parameters(optimizer)):
                self.unscale(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        """Step unless a gradient overflowed; return whether the step was applied.

        Raises:
            OperationError: if there is a closure, which cannot be called again under another scale.
        """
        if closure is not None:
            raise OperationError(
                "a loss scaler takes no closure", hint="precision 'no' or 'bf16' with this optimizer"
            )
        self.applied[id(optimizer)] = False
        self.scaler.step(optimizer)
        applied = self.applied[id(optimizer)]
        if len(self.applied) == len(self.optimizers):
            self._update()
        return applied

    def abandon(self) -> None:
        """Forget the round that has begun, with what it has found in gradients; the scale stays as it is."""
        if self.applied or self.unscaled:
            self._update(keep_scale=True)

    def _note_applied(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by the scaler on fused optimizers
        self.applied[id(optimizer)] = found_inf is None or not bool(found_inf)

    def _begin_round(self) -> None:
        """Close the last round, in which some optimizer did not take part."""
        waiting = [self.optimizers[key] for key in self.optimizers.keys() - self.applied.keys()]
        holding = [optimizer for optimizer in waiting if _has_gradients(optimizer)]
        if any(id(optimizer) in self.unscaled for optimizer in holding):
            raise OperationError(
                "backward() would add scaled gradients to gradients that were unscaled already",
                reason="they were clipped or unscaled, and their optimizer has not stepped since",
                hint="clip on the last micro-batch only: if accelerator.sync_gradients: ...",
            )
        self._update(keep_scale=bool(holding))

    def _update(self, *, keep_scale: bool = False) -> None:
        self.scaler.update(self.scaler.get_scale() if keep_scale else None)
        self.applied.clear()
        self.unscaled.clear()
