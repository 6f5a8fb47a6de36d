"""Experiment trackers, under the documented names.

The classes of services (`WandBTracker`, …) are those of the installed plugins, and are imported when asked for.
"""

from __future__ import annotations

import os
from typing import Any

from torchport.aliases import TRACKER_CLASSES
from torchport.labels import LoggerType
from torchport.plan.discovery import discover
from torchport.plan.registered import unregister_tracker
from torchport.plan.registry import load_reference
from torchport.training.general_tracker import GeneralTracker, on_main_process, register_tracker

__all__ = [
    *TRACKER_CLASSES,
    "GeneralTracker",
    "LoggerType",
    "on_main_process",
    "register_tracker",
    "unregister_tracker",
]


def __getattr__(name: str) -> Any:
    """Return the class of trackers that an installed plugin brings under a documented name."""
    if name not in TRACKER_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    tracker = TRACKER_CLASSES[name]
    entry = discover(os.environ).find("tracker", tracker, f"{__name__}.{name} is the tracker {tracker!r}")
    value = load_reference(entry.spec.factory)
    globals()[name] = value
    return value
