"""Collectives over any MPI library, through mpi4py."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchport.errors import LaunchError, OperationError
from torchport.plugin import Collectives, Topology
from torchport.plugin.process_group import Membership

from torchport_cpu import checked
from torchport_cpu.mpi_base import BACKEND
from torchport_cpu.mpi_engine import Engine
from torchport_cpu.mpi_group import MpiProcessGroup
from torchport_cpu.mpi_probe import FLAVOURS, flavour_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_ADDRESS_BYTES = 512


class MpiCollectives(Collectives):
    """A process group over MPI, which DDP, FSDP, DTensor and `torch.distributed` use like any other.

    The processes must be started by the launcher of the MPI library that mpi4py loads.
    """

    def rendezvous(self, topology: Topology, timeout: timedelta) -> Store:
        """Return the store at the launcher's address; without one, MPI tells where rank 0 has opened it."""
        if topology.master_addr or topology.world_size == 1:
            return super().rendezvous(topology, timeout)
        engine = Engine.start()
        meet(engine, topology, timeout)
        store, place = None, b""
        if topology.rank == 0:
            alone = topology.local_world_size == topology.world_size
            host = "127.0.0.1" if alone else engine.mpi.Get_processor_name()
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, 0, topology.world_size, is_master=True, timeout=timeout, wait_for_workers=False
            )
            place = f"{host} {store.port}".encode()
        memory = bytearray(place.ljust(_ADDRESS_BYTES))
        request = engine.world.Ibcast([memory, engine.mpi.BYTE], 0)
        _await(engine, request, timeout, f"rank {topology.rank} waited for the address of rank 0")
        if store is None:
            host, port = bytes(memory).decode().split()
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, int(port), topology.world_size, is_master=False, timeout=timeout
            )
        shared: Store = store
        return shared

    def open(self, topology: Topology, device: torch.device, timeout: timedelta, store: Store) -> None:
        """Initialise MPI and the default process group, or join the script's own.

        Raises:
            LaunchError: if the processes were not started by the launcher of the MPI library in use.
            TorchportError: if there is no MPI library.
        """
        register()
        meet(Engine.start(), topology, timeout)
        self._membership = Membership(self.spec.name, BACKEND, topology)
        self._membership.join(store, timeout)

    def close(self) -> None:
        """Destroy the process group if `open` initialised it; MPI itself ends with the process."""
        self._membership.leave()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes, once all have shown that shape and dtype are the same.

        Raises:
            OperationError: on every process, if they are not.
        """
        return checked.all_gather(tensor, super().all_gather, self.world_size)


def register() -> None:
    """Make the backend known to `torch.distributed` (`Backend.register_backend`)."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, backend_options: Any) -> MpiProcessGroup:
    """Create a group: called by `torch.distributed` on its members, and only on them."""
    engine = Engine.start()
    ranks, timeout = list(options.global_ranks_in_group), options.timeout
    if engine.world is None:
        meet(engine, _whole_world(engine), timeout)
    name = f"group {options.group_id!r}" if ranks else "default group"
    _gather_members(options.store, options.group_rank, options.group_size, timeout, name)
    with engine.lock:
        if ranks:
            members = engine.world.Get_group().Incl(ranks)
            tag = zlib.crc32(str(options.group_id).encode()) % 32768  # MPI allows at least these tags
            communicator = engine.world.Create_group(members, tag)
            members.Free()
        else:
            communicator = engine.world.Dup()
    return MpiProcessGroup(engine, communicator, name, timeout)


def _whole_world(engine: Engine) -> Topology:
    """Describe all processes of the MPI job, for scripts that initialise `torch.distributed` themselves."""
    world = engine.mpi.COMM_WORLD
    return Topology(rank=world.Get_rank(), world_size=world.Get_size(), source="MPI")


def _gather_members(store: Store, rank: int, size: int, timeout: timedelta, name: str) -> None:
    """Wait until all members are about to create the communicator: MPI itself would wait for ever."""
    keys = [f"torchport_mpi/{member}" for member in range(size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        absent = [member for member, key in enumerate(keys) if not store.check([key])]
        raise OperationError(
            f"{name} was not created by all of its members within {timeout.total_seconds():g} s",
            found=f"rank {rank} of the group waits for ranks {absent} of it",
            reason="torch.distributed.new_group must be called by all processes, in the same order",
        ) from error


def meet(engine: Engine, topology: Topology, timeout: timedelta) -> None:
    """Set `engine.world`, once: check that MPI sees the same job as `topology`, and wait for all of it.

    Raises:
        LaunchError: if MPI's world has another size.
        OperationError: if a process does not come within `timeout`.
    """
    if engine.world is not None:
        return
    whole = engine.mpi.COMM_WORLD
    if whole.Get_size() != topology.world_size:
        raise _wrong_world(engine, topology, os.environ)
    with engine.lock:
        request = whole.Ibarrier()
    _await(engine, request, timeout, f"rank {topology.rank} waited for the other processes of the MPI job")
    with engine.lock:
        engine.world = whole.Split(0, topology.rank)


def _await(engine: Engine, request: Any, timeout: timedelta, what: str) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        with engine.lock:
            if request.Test():
                return
        if time.monotonic() > deadline:
            raise OperationError(f"{what} for more than {timeout.total_seconds():g} s")
        time.sleep(0.001)


def _wrong_world(engine: Engine, topology: Topology, environ: Mapping[str, str]) -> LaunchError:
    library = flavour_of(engine.mpi.Get_library_version())
    started = "openmpi" if "OMPI_COMM_WORLD_SIZE" in environ else "mpich" if "PMI_SIZE" in environ else ""
    if not started:
        reason = f"the processes were started by {topology.source}, which MPI knows nothing of"
    elif (started == "openmpi" and library != "openmpi") or (started == "mpich" and library == "openmpi"):
        reason = (
            f"the processes were started by the launcher of {FLAVOURS[started]},"
            f" but mpi4py loads {FLAVOURS[library]}, for which each is a job of its own"
        )
    else:
        reason = f"the launcher started another number of processes than {topology.source} says"
    return LaunchError(
        f"collectives 'mpi' want {topology.world_size} processes in one MPI job",
        found=f"MPI's COMM_WORLD has {engine.mpi.COMM_WORLD.Get_size()} ({FLAVOURS[library]})",
        reason=reason,
        hint="torchport launch --launcher mpirun --num-processes"
        f" {topology.world_size} ..., which takes the launcher that fits the library (or set MPI4PY_LIBMPI)",
    )
