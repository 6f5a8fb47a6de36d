"""Torchport on CPUs: descriptors only; imports neither torch nor MPI."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

from torchport.plugin import (
    BackendSpec,
    CollectivesSpec,
    LauncherSpec,
    Probe,
    hookimpl,
)


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer the host's own processor, which is always there and never preferred."""
    yield BackendSpec(
        name="cpu",
        factory="torchport_cpu.backend:CpuBackend",
        probe="torchport_cpu:probe",
        summary="the host's own processor",
        device_type="cpu",
        priority=0,
        collectives="gloo",
        distributed_type="MULTI_CPU",
    )


@hookimpl
def torchport_collectives() -> Iterable[CollectivesSpec]:
    """Offer gloo, which comes with PyTorch, and MPI through mpi4py."""
    yield CollectivesSpec(
        name="gloo",
        factory="torchport_cpu.gloo:GlooCollectives",
        summary="PyTorch's own collectives over TCP and shared memory",
        device_types=("cpu",),
    )
    yield CollectivesSpec(
        name="mpi",
        factory="torchport_cpu.mpi:MpiCollectives",
        probe="torchport_cpu.mpi_probe:probe",
        summary="any MPI library, through mpi4py",
        device_types=("cpu",),
        runtime=("mpi4py>=4.0",),
    )


@hookimpl
def torchport_launchers() -> Iterable[LauncherSpec]:
    """Offer the MPI library's own launcher and SLURM's."""
    yield LauncherSpec(
        name="mpirun",
        factory="torchport_cpu.mpirun:MpirunLauncher",
        probe="torchport_cpu.mpirun:probe",
        summary="mpirun or mpiexec of Open MPI, MPICH or Intel MPI",
        features=frozenset({"machines"}),
    )
    yield LauncherSpec(
        name="slurm",
        factory="torchport_cpu.slurm:SlurmLauncher",
        probe="torchport_cpu.slurm:probe",
        summary="srun inside a SLURM allocation",
        features=frozenset({"machines"}),
    )


def probe() -> Probe:
    """Say that there is a processor; one process uses all of its cores unless told otherwise."""
    return Probe(
        available=True,
        count=1,
        details={"processor": platform.machine(), "cores": str(os.cpu_count())},
    )
