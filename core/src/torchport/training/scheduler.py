"""A learning-rate scheduler that steps with its optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchport.training.optimizer import AcceleratedOptimizer

if TYPE_CHECKING:
    from torchport.state import GradientState


class AcceleratedScheduler:
    """Steps a scheduler when its optimizers have stepped, as often as a single process would have.

    With N processes, each optimizer step consumes N batches. A scheduler made for the number of batches of one
    process is therefore stepped N times, unless the loader's batch size is that of all processes together
    (`split_batches`) or `steps_per_update` says otherwise.

    Args:
        scheduler: The scheduler.
        optimizers: The prepared optimizers it follows.
        gradients: The shared gradient state.
        step_with_optimizer: Whether to follow the optimizers; if not, every `step` is passed on.
        steps_per_update: Steps of the scheduler for each step of the optimizers.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Sequence[AcceleratedOptimizer],
        gradients: GradientState,
        *,
        step_with_optimizer: bool = True,
        steps_per_update: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers = tuple(optimizers)
        self.gradient_state = gradients
        self.step_with_optimizer = step_with_optimizer
        self.steps_per_update = steps_per_update

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, if the optimizers have stepped."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                self.scheduler._step_count += 1
            return
        for optimizer in self.optimizers:
            if not optimizer._applied:
                return
        if self.steps_per_update == 1 or args or kwargs:  # a metric, or an epoch, counts once
            self.scheduler.step(*args, **kwargs)
            return
        total = getattr(self.scheduler, "total_steps", None)
        for _ in range(self.steps_per_update):
            if total is None or self.scheduler._step_count <= total:
                self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> Any:
        """Return the last learning rate of each group."""
        return self.scheduler.get_last_lr()

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
