"""Torchport: one PyTorch script, any accelerator, any sharding strategy.

Names are imported when they are first used, so that `import torchport` imports neither torch nor plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchport.accelerator import Accelerator
    from torchport.state import AcceleratorState, GradientState, PartialState

__version__ = "0.1.0"

_EXPORTS = {
    "Accelerator": "torchport.accelerator",
    "AcceleratorState": "torchport.state",
    "GradientState": "torchport.state",
    "PartialState": "torchport.state",
}
"""Public names and the modules that define them."""

__all__ = ["Accelerator", "AcceleratorState", "GradientState", "PartialState", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
