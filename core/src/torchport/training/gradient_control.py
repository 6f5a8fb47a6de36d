"""Gradients: the methods of `Accelerator` that a training step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from torchport.config.kwargs import read_steps
from torchport.plugin.context import RunContext
from torchport.training.accumulation import AccumulationWindow
from torchport.training.optimizer import AcceleratedOptimizer

if TYPE_CHECKING:
    from torchport.checkpoint.state import Contents
    from torchport.plugin.strategy import Prepared
    from torchport.preparation import Preparation
    from torchport.state import GradientState


class GradientControl:
    """Accumulate, clip and unscale; the class that mixes it in has what is declared here."""

    gradient_state: GradientState
    _window: AccumulationWindow
    _bound: Prepared
    _contents: Contents
    _context: RunContext
    _preparation: Preparation
    _autocast: Callable[[], AbstractContextManager[Any]]

    def accumulate(
        self, *models: torch.nn.Module, num_items: Any = None, reduction: str = "mean"
    ) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch.

        Inside it, `optimizer.step()`, `scheduler.step()` and `optimizer.zero_grad()` do their work on the last
        micro-batch of each accumulation window and nothing on the others.

        Args:
            *models: The models trained in it.
            num_items: Number of items (tokens, pixels, …) that the loss of this micro-batch is about: a number or
                a tensor without dimensions. Given, every item of the window weighs the same over all
                micro-batches and processes, as in one big batch; if not, every micro-batch does.
            reduction: `"mean"` if the loss is the mean over `num_items`, `"sum"` if it is their sum.
        """
        return self._window.begin(models, num_items, reduction)

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch ends its accumulation window."""
        return bool(self.gradient_state.sync_gradients)

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._window.steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        value = read_steps(value, "gradient_accumulation_steps")
        self.gradient_state.plugin.num_steps = self._window.steps = self._window.divisor = (
            self._window.size
        ) = value

    def no_sync(self, model: torch.nn.Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which the gradients of a model stay on this process."""
        return self._bound.no_sync(model if model is not None else torch.nn.Module())

    def trigger_sync_in_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a context whose backward exchanges gradients of forwards that ran under `no_sync`."""
        return self._contents.strategy.trigger_sync_in_backward(model)

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[Any]:
        """Return a context in which operations run in the run's precision, for code outside of models."""
        if autocast_handler is not None:
            return self._context.precision.forward_context(self._context, autocast_handler)()
        return self._autocast()

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor] | torch.Tensor, max_norm: float, norm_type: float = 2
    ) -> torch.Tensor | None:
        """Clip gradients to a total norm (`torch.nn.utils.clip_grad_norm_`), after dividing the loss scale out.

        Like the optimizer's step, it waits for the last micro-batch of the accumulation window.

        Returns:
            The total norm before clipping, a tensor without dimensions; `None` on the other micro-batches.
        """
        if not self.sync_gradients:
            return None
        return self._bound.clip_grad_norm(_listed(parameters), max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor] | torch.Tensor, clip_value: float) -> None:
        """Clip each element of the gradients (`torch.nn.utils.clip_grad_value_`), where a window ends."""
        if self.sync_gradients:
            self._bound.clip_grad_value(_listed(parameters), clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide the loss scale out of the gradients of some optimizers, or of all."""
        chosen = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for one in chosen:
            self._bound.unscale_gradients(one.optimizer if isinstance(one, AcceleratedOptimizer) else one)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any optimizer was skipped, because a gradient overflowed."""
        return any(optimizer.step_was_skipped for optimizer in self._contents.optimizers)

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float | None = None) -> None:
        """Run the backward inside optimizers that step in it (LOMO); `backward(loss, learning_rate=...)` does too.

        Args:
            loss: A tensor of one element.
            learning_rate: The learning rate of this step.

        Raises:
            ConfigurationError: if no such optimizer is prepared, or there is no learning rate.
            UnsupportedOperationError: over several processes, in float16 or under gradient accumulation.
        """
        self._preparation.lomo_backward(loss, learning_rate)


def _listed(parameters: Iterable[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(parameters, torch.nn.Module):
        raise TypeError("clipping takes parameters, not a module: model.parameters()")
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
