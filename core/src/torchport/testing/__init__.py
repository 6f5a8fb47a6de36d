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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchport.lazy import lazy_exports

if TYPE_CHECKING:
    from torchport.testing.module_stub import ModuleStubConformance
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
    "ModuleStubConformance",
    "PackageConformance",
    "PrecisionConformance",
    "Scorecard",
    "StrategyConformance",
    "TrackerConformance",
]


_SUITES = dict.fromkeys(__all__, ".suites")
_ELSEWHERE = {"ModuleStubConformance": ".module_stub", "Scorecard": ".scorecard"}

# The pytest plugin imports this package at every start of pytest: suites are imported when they are asked for.
__getattr__: Callable[[str], Any] = lazy_exports(__name__, {**_SUITES, **_ELSEWHERE})
