"""A plugin that imports torch at its top level, and one whose distribution does not name the core it is for."""

import torch
from torchport.plugin import TrackerSpec, hookimpl

assert torch


@hookimpl
def torchport_trackers():
    yield TrackerSpec(name="heavy", factory="mutant_tracker:SteadyTracker", summary="imports torch")
