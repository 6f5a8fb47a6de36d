"""The variables that tell a process its rank: written by the core's launchers, and read back."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NoReturn

from torchport import envvars
from torchport.errors import LaunchError
from torchport.plugin.specs import Topology

ELASTIC_RUN_ID = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's elastic agent in each worker."""

_RANKS = (envvars.RANK, envvars.WORLD_SIZE, envvars.LOCAL_RANK, envvars.LOCAL_WORLD_SIZE)


def rank_variables(topology: Topology) -> dict[str, str]:
    """Return the variables that `read_topology` makes the same topology of."""
    return {
        envvars.RANK: str(topology.rank),
        envvars.WORLD_SIZE: str(topology.world_size),
        envvars.LOCAL_RANK: str(topology.local_rank),
        envvars.LOCAL_WORLD_SIZE: str(topology.local_world_size),
        envvars.NODE_RANK: str(topology.node_rank),
        envvars.MASTER_ADDR: topology.master_addr,
        envvars.MASTER_PORT: str(topology.master_port),
    }


def without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` less what an outer launcher said about ranks, for processes of a new job."""
    inner = (*_RANKS, envvars.NODE_RANK, envvars.MASTER_ADDR, envvars.MASTER_PORT)
    outer = ("TORCHELASTIC_", "ROLE_", "GROUP_WORLD_SIZE")
    return {
        name: value for name, value in environ.items() if name not in inner and not name.startswith(outer)
    }


def read_topology(environ: Mapping[str, str], source: str) -> Topology | None:
    """Read a process's place in its job; `None` if no variable gives it a rank.

    Raises:
        ValueError: if variables are missing, not numbers, or contradict each other.
    """
    if not any(environ.get(name) for name in (envvars.RANK, envvars.LOCAL_RANK)):
        if environ.get(envvars.WORLD_SIZE, "1") not in ("", "1"):
            raise ValueError(
                f"{envvars.WORLD_SIZE}={environ[envvars.WORLD_SIZE]} is set, but {envvars.RANK} is not"
            )
        return None
    missing = [name for name in _RANKS if not environ.get(name)]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in _RANKS if environ.get(name))
        raise ValueError(f"{present} without {', '.join(missing)}")
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in _RANKS)
    nodes = -(-world_size // local_world_size) if local_world_size > 0 else 0
    node_rank = (
        _number(environ, envvars.NODE_RANK)
        if environ.get(envvars.NODE_RANK)
        else rank // max(1, local_world_size)
    )
    if not 0 <= rank < world_size:
        _contradict(
            environ, envvars.RANK, envvars.WORLD_SIZE, "ranks run from 0 to the number of processes less one"
        )
    if not 0 <= local_rank < local_world_size:
        _contradict(environ, envvars.LOCAL_RANK, envvars.LOCAL_WORLD_SIZE, "local ranks run from 0 as well")
    if local_world_size > world_size:
        _contradict(
            environ, envvars.LOCAL_WORLD_SIZE, envvars.WORLD_SIZE, "a machine has a part of all processes"
        )
    if world_size > 1:
        absent = [name for name in (envvars.MASTER_ADDR, envvars.MASTER_PORT) if not environ.get(name)]
        if absent:
            raise ValueError(f"{envvars.WORLD_SIZE}={world_size} without {' and '.join(absent)}")
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        num_nodes=max(nodes, node_rank + 1),
        master_addr=environ.get(envvars.MASTER_ADDR, ""),
        master_port=_number(environ, envvars.MASTER_PORT) if environ.get(envvars.MASTER_PORT) else 0,
        source=source,
    )


def free_port() -> int:
    """Return a TCP port that nothing listens on now.

    Raises:
        LaunchError: if there is none.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise LaunchError("no free TCP port could be found", reason=str(error)) from error


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not a whole number") from None


def _contradict(environ: Mapping[str, str], name: str, other: str, why: str) -> NoReturn:
    raise ValueError(f"{name}={environ[name]} contradicts {other}={environ[other]}: {why}")
