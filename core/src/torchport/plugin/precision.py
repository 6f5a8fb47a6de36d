"""The interface to a number format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from torchport.plugin.specs import PrecisionSpec

if TYPE_CHECKING:
    from torchport.plugin.binding import ScaledStep
    from torchport.plugin.context import RunContext


class Precision(ABC):
    """A number format to work in.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    scaler: torch.amp.GradScaler | None = None
    """The loss scaler, where the format needs one. Set by `open`."""

    scaling: ScaledStep | None = None
    """The loss scaling that `bind_step` shares between all optimizers of the run."""

    def __init__(self, spec: PrecisionSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype in which a strategy may hold and exchange parameters for a forward; `None`: their own."""
        return None

    def open(self, context: RunContext) -> None:
        """Get ready for a run; called once, before any model is bound."""

    @abstractmethod
    def apply(self, model: torch.nn.Module, context: RunContext) -> torch.nn.Module:
        """Bind `model` to this format and return it, or a converted one.

        Called once for each prepared model, before it is distributed. What
        the precision of an earlier run did to it has been undone by `restore`.
        """

    def restore(self, model: torch.nn.Module) -> None:
        """Undo on a model what `apply` did to it: for saving it, and when the run forgets it (`free_memory`)."""

    def forward_context(
        self, context: RunContext, options: Any = None
    ) -> Callable[[], AbstractContextManager[Any]]:
        """Return a factory of the context of forward passes; `options` overrides the run's handler."""
        return nullcontext

    def convert_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to use for parameters of this format."""
        return optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold (tensors and plain values only)."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
