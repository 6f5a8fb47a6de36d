"""What scripts prepare in the place of schedulers and loaders that Megatron-Core makes itself."""

from __future__ import annotations

from typing import Any

from torchport.errors import UnsupportedOperationError


class MegatronLMDummyScheduler:
    """Stands for the scheduler that Megatron-Core makes; it is stepped with the optimizer, by the engine.

    Args:
        optimizer: The optimizer whose learning rate it changes.
        total_num_steps: Optimizer steps until the smallest learning rate.
        warmup_num_steps: Optimizer steps in which the learning rate rises.
        **kwargs: Kept in `kwargs`, for scripts that ask.
    """

    def __init__(
        self, optimizer: Any, total_num_steps: int | None = None, warmup_num_steps: int = 0, **kwargs: Any
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.kwargs = kwargs
        self.scheduler: Any = None

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the engine steps the scheduler when it has stepped the optimizer."""

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each group of parameters."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of Megatron-Core's scheduler."""
        state: dict[str, Any] = self.scheduler.state_dict() if self.scheduler is not None else {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


class MegatronLMDummyDataLoader:
    """Stands for loaders of Megatron's indexed data sets, which are not supported yet.

    Raises:
        UnsupportedOperationError: always.
    """

    def __init__(self, **dataset_kwargs: Any) -> None:
        raise UnsupportedOperationError(
            "MegatronLMDummyDataLoader",
            reason="Megatron's indexed data sets are not supported yet",
            hint="prepare an ordinary torch.utils.data.DataLoader",
        )
