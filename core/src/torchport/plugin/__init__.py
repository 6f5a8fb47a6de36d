"""The seam: everything that the author of a plugin imports.

```python
from torchport.plugin import BackendSpec, hookimpl        # light: imports neither torch nor a plugin
from torchport.plugin import Backend, Capabilities, Probe  # interfaces; `Backend` imports torch
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchport.config.schema import setting
from torchport.lazy import lazy_exports
from torchport.plugin.hookspecs import PROJECT, hookimpl
from torchport.plugin.specs import (
    HOOK_API,
    KINDS,
    BackendSpec,
    Capabilities,
    CollectivesSpec,
    CommandSpec,
    Finding,
    Kind,
    LauncherSpec,
    PrecisionSpec,
    Probe,
    QuantizerSpec,
    Requirements,
    Spec,
    StrategySpec,
    Topology,
    TrackerSpec,
)

if TYPE_CHECKING:
    from torchport.plugin.backend import Backend
    from torchport.plugin.binding import bind_step
    from torchport.plugin.collectives import Collectives
    from torchport.plugin.context import RunContext
    from torchport.plugin.installation import missing_runtime, probe_module, torch_build
    from torchport.plugin.launcher import Job, Launcher
    from torchport.plugin.module_backend import ModuleBackend
    from torchport.plugin.parallelism import ParallelismConfig
    from torchport.plugin.precision import Precision
    from torchport.plugin.process_group import ProcessGroupCollectives
    from torchport.plugin.quantizer import Quantizer
    from torchport.plugin.strategy import Prepared, PrepareRequest, Strategy
    from torchport.plugin.tracker import Tracker
    from torchport.plugin.values import as_images, as_table, flatten, plain

_INTERFACES = {
    "Backend": ".backend",
    "Collectives": ".collectives",
    "Job": ".launcher",
    "Launcher": ".launcher",
    "ParallelismConfig": ".parallelism",
    "Precision": ".precision",
    "PrepareRequest": ".strategy",
    "Prepared": ".strategy",
    "ProcessGroupCollectives": ".process_group",
    "Quantizer": ".quantizer",
    "RunContext": ".context",
    "Strategy": ".strategy",
    "Tracker": ".tracker",
    "as_images": ".values",
    "as_table": ".values",
    "bind_step": ".binding",
    "flatten": ".values",
    "missing_runtime": ".installation",
    "plain": ".values",
    "ModuleBackend": ".module_backend",
    "probe_module": ".installation",
    "torch_build": ".installation",
}

__all__ = [
    "HOOK_API",
    "KINDS",
    "PROJECT",
    "Backend",
    "BackendSpec",
    "Capabilities",
    "Collectives",
    "CollectivesSpec",
    "CommandSpec",
    "Finding",
    "Job",
    "Kind",
    "Launcher",
    "LauncherSpec",
    "ModuleBackend",
    "ParallelismConfig",
    "Precision",
    "PrecisionSpec",
    "PrepareRequest",
    "Prepared",
    "Probe",
    "ProcessGroupCollectives",
    "Quantizer",
    "QuantizerSpec",
    "Requirements",
    "RunContext",
    "Spec",
    "Strategy",
    "StrategySpec",
    "Topology",
    "Tracker",
    "TrackerSpec",
    "as_images",
    "as_table",
    "bind_step",
    "flatten",
    "hookimpl",
    "lazy_exports",
    "missing_runtime",
    "plain",
    "probe_module",
    "setting",
    "torch_build",
]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _INTERFACES)
