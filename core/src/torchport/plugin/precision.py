"""The interface to a number format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchport.plugin.specs import PrecisionSpec

if TYPE_CHECKING:
    from torchport.plugin.context import RunContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionBinding:
    """A model bound to a precision.

    Attributes:
        model: The model to train: the same object, or a converted one.
        restore: Undoes on `model` what binding did to it, for saving or handing it back to the user.
    """

    model: torch.nn.Module
    restore: Callable[[], None] = lambda: None


class Precision(ABC):
    """A number format to work in.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    scaler: torch.amp.GradScaler | None = None
    """The loss scaler, where the format needs one. Set by `open`."""

    def __init__(self, spec: PrecisionSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    def open(self, context: RunContext) -> None:
        """Get ready for a run; called once, before any model is bound."""

    @abstractmethod
    def apply(self, model: torch.nn.Module, context: RunContext) -> PrecisionBinding:
        """Bind `model` to this format; called once for each prepared model, before it is distributed."""

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
