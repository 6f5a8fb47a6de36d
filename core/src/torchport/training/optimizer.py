"""An optimizer that steps where an accumulation window ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchport.plugin.binding import plain_step, zero_grad
from torchport.plugin.strategy import Prepared
from torchport.training.lomo import fuses_backward, stepped_in_backward

if TYPE_CHECKING:
    from torchport.state import GradientState


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Passes `step` and `zero_grad` on at the end of accumulation windows, and skips them elsewhere.

    Args:
        optimizer: The optimizer that the strategy prepared.
        prepared: The strategy's bound callables.
        gradients: The shared gradient state.
        check: Called before the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        prepared: Prepared,
        gradients: GradientState,
        check: Callable[[], None] | None = None,
    ) -> None:
        # No super().__init__: state and parameter groups are those of the wrapped optimizer.
        self.optimizer = optimizer
        self.gradient_state = gradients
        step = stepped_in_backward if fuses_backward(optimizer) else prepared.step
        self._bound_step = step if check is None else functools.partial(self._first_step, check, step)
        self._bound_zero_grad = prepared.zero_grad
        self._applied = True

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, because a gradient overflowed under loss scaling."""
        return not self._applied

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step at the end of an accumulation window; elsewhere do nothing."""
        if self.gradient_state.sync_gradients:
            self._applied = self._bound_step(self.optimizer, closure)

    def _first_step(
        self,
        check: Callable[[], None],
        step: Callable[..., bool],
        optimizer: torch.optim.Optimizer,
        closure: Any,
    ) -> bool:
        check()
        self._bound_step = step
        return step(optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients at the end of an accumulation window; elsewhere keep them."""
        if self.gradient_state.sync_gradients:
            self._bound_zero_grad(self.optimizer, set_to_none)

    def discard_gradients(self) -> None:
        """Clear gradients wherever the accumulation window stands."""
        self._bound_zero_grad(self.optimizer, True)

    # The wrapped optimizer's own state, as everything that takes an optimizer expects it.

    @property
    def state(self) -> Any:
        """State by parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters and their settings."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings of groups that do not say otherwise."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state."""
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> None:
        """Put a schedule-free optimizer into training mode."""
        mode = getattr(self.optimizer, "train", None)
        if mode is not None:
            mode()

    def eval(self) -> None:
        """Put a schedule-free optimizer into evaluation mode."""
        mode = getattr(self.optimizer, "eval", None)
        if mode is not None:
            mode()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Return what can be pickled; a copy steps as PyTorch does, without the strategy that bound it."""
        bound = ("_bound_step", "_bound_zero_grad")
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bound_step, self._bound_zero_grad = plain_step, zero_grad

    def __repr__(self) -> str:
        return f"AcceleratedOptimizer({self.optimizer!r})"
