"""Stand-ins for an optimizer and a scheduler that DeepSpeed's configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchport.errors import ConfigurationError


class DummyOptim(torch.optim.Optimizer):
    """Stands for the optimizer of the DeepSpeed configuration; `prepare` returns the real one.

    Args:
        params: Parameters, or groups of them.
        lr: What `"auto"` means for the learning rate.
        weight_decay: What `"auto"` means for the weight decay.
        **kwargs: What `"auto"` means for further parameters of the optimizer (`betas`, `eps`).
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.001,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Refuse: there is nothing to step.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError("a DummyOptim does not step", hint="prepare it together with its model")


class DummyScheduler:
    """Stands for the scheduler of the DeepSpeed configuration; `prepare` returns the real one.

    Args:
        optimizer: The optimizer that it follows.
        total_num_steps: What `"auto"` means for all steps, counted over the batches of one process.
        warmup_num_steps: What `"auto"` means for the steps of the warm-up, counted likewise.
        lr_scheduler_callable: Makes a scheduler of one's own from the engine's optimizer instead.
        **kwargs: What `"auto"` means for further parameters of the scheduler.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: there is nothing to step.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "a DummyScheduler does not step", hint="prepare it together with its model and optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the scheduler itself is the engine's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""
