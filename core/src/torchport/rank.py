"""Which process of the job this is, also before a run is opened."""

from __future__ import annotations

import functools
import os

from torchport import envvars
from torchport.aliases import translate_environment
from torchport.plan.discovery import discover
from torchport.plan.topology import detect_topology
from torchport.plugin.specs import Topology
from torchport.runtime import Runtime


def current_topology() -> Topology:
    """Return the place of this process in its job: that of the open run, or else what the launcher said.

    Raises:
        LaunchError: if no run is open and the launcher's variables contradict each other.
    """
    if Runtime.current is not None:
        return Runtime.current.topology
    return _detected(os.getpid(), os.environ.get(envvars.RANK), os.environ.get(envvars.WORLD_SIZE))


@functools.lru_cache(maxsize=4)
def _detected(process: int, rank: str | None, world_size: str | None) -> Topology:
    """Ask the launchers once for each process, and again when it is given another rank."""
    environ = translate_environment(os.environ)
    return detect_topology(environ, discover(environ))
