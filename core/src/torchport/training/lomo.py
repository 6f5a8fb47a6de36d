"""Optimizers of the LOMO family, which step inside the backward and never hold all gradients.

They are told by their method `fused_backward(loss, lr)`. See https://arxiv.org/abs/2306.09782.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.plugin.context import RunContext

if TYPE_CHECKING:
    from torchport.training.optimizer import AcceleratedOptimizer


def fuses_backward(optimizer: Any) -> bool:
    """Whether an optimizer runs the backward itself."""
    return callable(getattr(type(optimizer), "fused_backward", None))


def stepped_in_backward(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
    """Do nothing: the backward has stepped already."""
    return True


def fused_backward(
    optimizers: Iterable[AcceleratedOptimizer],
    loss: torch.Tensor,
    learning_rate: float | None,
    context: RunContext,
) -> None:
    """Run the backward of a loss inside the optimizers that step in it.

    Args:
        optimizers: The prepared optimizers.
        loss: A tensor of one element.
        learning_rate: The learning rate of this step.
        context: The run.

    Raises:
        ConfigurationError: if there is no such optimizer, or no learning rate.
        UnsupportedOperationError: over several processes, under a loss scale or under accumulation.
    """
    fused: list[Any] = [one.optimizer for one in optimizers if fuses_backward(one.optimizer)]
    if not fused:
        raise ConfigurationError(
            "lomo_backward needs a prepared optimizer with the method fused_backward",
            hint="pip install lomo-optim, and accelerator.prepare(model, lomo_optim.Lomo(model, lr=1e-3))",
        )
    if learning_rate is None:
        raise ConfigurationError(
            "this optimizer steps inside the backward and needs the learning rate there",
            hint="accelerator.backward(loss, learning_rate=scheduler.get_last_lr()[0])",
        )
    obstacle = _obstacle(context)
    if obstacle:
        raise UnsupportedOperationError(
            "an optimizer that steps inside the backward cannot be used here", reason=obstacle
        )
    for optimizer in fused:
        optimizer.fused_backward(loss, learning_rate)


def _obstacle(context: RunContext) -> str:
    if context.topology.world_size > 1:
        return "it would step with the gradients of one process, before they are averaged over all"
    if context.precision.scaler is not None:
        return "the loss is scaled, and it would step with scaled gradients: take bf16"
    if context.accumulation_steps > 1:
        return "it steps at every micro-batch, so that there is nothing to accumulate"
    return ""


def backward_or_fused(
    backward: Callable[..., None],
    fused: Callable[[torch.Tensor, float], None],
    loss: torch.Tensor,
    **kwargs: Any,
) -> None:
    """Run a plain backward, or (given a `learning_rate`) that of optimizers which step in it."""
    if "learning_rate" in kwargs:
        fused(loss, kwargs["learning_rate"])
    else:
        backward(loss, **kwargs)
