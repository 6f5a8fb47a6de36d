"""A plugin whose distribution does not say for which core it is."""

from torchport.plugin import TrackerSpec, hookimpl


@hookimpl
def torchport_trackers():
    yield TrackerSpec(name="without-core", factory="mutant_tracker:SteadyTracker", summary="for any core")
