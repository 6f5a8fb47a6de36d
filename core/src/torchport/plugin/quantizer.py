"""The interface to a way to store weights in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchport.plugin.specs import QuantizerSpec

if TYPE_CHECKING:
    import torch


class Quantizer(ABC):
    """A way to store weights in fewer bits.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    def __init__(self, spec: QuantizerSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    @abstractmethod
    def convert(self, model: torch.nn.Module, config: Any) -> torch.nn.Module:
        """Return `model` with its weights quantized as `config` says."""

    def skip_modules(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Name the modules that are left in full precision unless the configuration says otherwise."""
        return ()

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write a quantized model."""
        self._unsupported("save")

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """Read what `save` wrote into `model`."""
        self._unsupported("load")
        return model

    def _unsupported(self, what: str) -> None:
        from torchport.errors import UnsupportedOperationError

        raise UnsupportedOperationError(f"quantizer {self.spec.name!r} cannot {what} quantized models")
