"""What the worker scripts share: joining the job that the launcher started."""

import os
import sys
import warnings
from datetime import timedelta

import torch
from torchport.plugin import CollectivesSpec, LauncherSpec, Topology
from torchport_cpu.gloo import GlooCollectives
from torchport_cpu.mpi import MpiCollectives
from torchport_cpu.mpirun import MpirunLauncher

torch.set_num_threads(1)
warnings.simplefilter("ignore", FutureWarning)  # of names that torch 2.13 deprecates and older releases need


def topology() -> Topology:
    """The place of this process, as the MPI launcher tells it; a job of one process without a launcher."""
    launcher = MpirunLauncher(LauncherSpec(name="mpirun", factory="torchport_cpu.mpirun:MpirunLauncher"))
    return launcher.detect(os.environ) or Topology()


def join(kind: str = "mpi", seconds: float = 30):
    """Open collectives and return them with this process's topology."""
    place, timeout = topology(), timedelta(seconds=seconds)
    factory = {"mpi": MpiCollectives, "gloo": GlooCollectives}[kind]
    collectives = factory(CollectivesSpec(name=kind, factory=f"torchport_cpu.{kind}:{factory.__name__}"))
    store = collectives.rendezvous(place, timeout)
    collectives.open(place, torch.device("cpu"), timeout, store)
    return collectives, place


def say(*words) -> None:
    """Print one whole line: the launcher passes on what ranks write as it comes."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def raises(kind, function, *fragments) -> str:
    """Check that a call raises an error whose text has all fragments."""
    try:
        function()
    except kind as error:
        missing = [fragment for fragment in fragments if fragment not in str(error)]
        if missing:
            raise AssertionError(f"{missing} not in: {error}") from error
        return str(error)
    raise AssertionError(f"nothing raised {kind.__name__}")
