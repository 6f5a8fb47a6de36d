"""What `prepare` returns for the optimizer and the scheduler of an engine: the engine steps both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class DeepSpeedOptimizerWrapper(torch.optim.Optimizer):
    """Shows the optimizer of an engine as an ordinary one; `Accelerator` binds its step to the engine's.

    Args:
        optimizer: The engine's optimizer, whatever its class.
    """

    def __init__(self, optimizer: Any) -> None:
        # No super().__init__: state and parameter groups are those of the wrapped optimizer.
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters and their settings; ZeRO's are flat partitions."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State by partition."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Settings of groups that do not say otherwise."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return dict(getattr(inner, "defaults", {}))

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, because a gradient overflowed."""
        return bool(getattr(self.optimizer, "overflow", False))

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do nothing: the engine steps."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine clears gradients when it has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this process's partition."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a partition's state."""
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"DeepSpeedOptimizerWrapper({type(self.optimizer).__name__})"


class DeepSpeedSchedulerWrapper:
    """Shows the scheduler of an engine; the engine steps it once for each step of its optimizer.

    Args:
        scheduler: The engine's scheduler.
        optimizers: The optimizer that it follows.
    """

    def __init__(self, scheduler: Any, optimizers: Any) -> None:
        self.scheduler = scheduler
        self.optimizer = optimizers

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the engine steps it."""

    def get_last_lr(self) -> Any:
        """Return the last learning rate of each group."""
        last = getattr(self.scheduler, "get_last_lr", None)
        try:
            return last() if last is not None else self._rates()
        except AssertionError:  # DeepSpeed's own, before its first step
            return self._rates()

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scheduler's state."""
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)
