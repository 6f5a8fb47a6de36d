"""The conformance kit: suites that a plugin's own tests inherit from.

```python
from torchport.testing import BackendConformance

class TestConformance(BackendConformance):
    backend = "acme"
    levels = ("L0",)  # what needs no hardware; leave it out to run all
```

`torchport conformance acme` runs the same checks without pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchport.testing.scorecard import Scorecard
    from torchport.testing.suites import (
        BackendConformance,
        CollectivesConformance,
        PackageConformance,
        PrecisionConformance,
        StrategyConformance,
        TrackerConformance,
    )

__all__ = [
    "BackendConformance",
    "CollectivesConformance",
    "PackageConformance",
    "PrecisionConformance",
    "Scorecard",
    "StrategyConformance",
    "TrackerConformance",
]


def __getattr__(name: str) -> Any:
    """Import a suite when it is asked for: the pytest plugin imports this package at every start of pytest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "scorecard" if name == "Scorecard" else "suites"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
