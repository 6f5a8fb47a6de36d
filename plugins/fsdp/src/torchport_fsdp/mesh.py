"""The mesh of processes over which a run shards and replicates."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchport.errors import ConfigurationError
from torchport.plugin import ParallelismConfig, RunContext, Topology

from torchport_fsdp.config import FullyShardedDataParallelPlugin, ShardingStrategy

REPLICATE, SHARD, TENSOR = "dp_replicate", "dp_shard", "tp"
JOINT = "dp_shard_cp"
"""The dimension over which parameters are sharded where sequences are spread too."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The meshes of a run that was asked for one.

    Attributes:
        whole: All dimensions that are used, by their names; `dp_shard` always.
        data: The dimensions over which parameters are replicated and sharded.
        tensor: The dimension over which layers are spread; `None` without one.
    """

    whole: DeviceMesh
    data: DeviceMesh
    tensor: DeviceMesh | None


def lay_out(device_type: str, parallelism: ParallelismConfig) -> Layout:
    """Make the meshes of a run; every process must do so.

    Parameters are sharded over `dp_shard` and the dimensions that spread sequences together, since the processes of
    these would hold the same ones.
    """
    sizes = parallelism.sizes
    spread = {name: sizes[name] for name in ("cp", "sp") if sizes[name] > 1}
    outer = {REPLICATE: sizes[REPLICATE]} if parallelism.dp_replicate_enabled else {}
    inner = {TENSOR: sizes[TENSOR]} if parallelism.tp_enabled else {}
    parts = {SHARD: sizes[SHARD], **spread}
    shard = JOINT if spread else SHARD
    if not spread or hasattr(DeviceMesh, "_unflatten"):
        joint = {**outer, shard: math.prod(parts.values()), **inner}
        root = init_device_mesh(device_type, tuple(joint.values()), mesh_dim_names=tuple(joint))
        whole = root if not spread else root._unflatten(shard, tuple(parts.values()), tuple(parts))
    else:  # before PyTorch 2.10
        named = {**outer, **parts, **inner}
        whole = root = init_device_mesh(device_type, tuple(named.values()), mesh_dim_names=tuple(named))
        root[tuple(parts)]._flatten(shard)
    _forget_closed_groups()
    data = root[(REPLICATE, shard)] if outer else root[shard]
    if inner:  # advice about the order of exchanges, for authors of PyTorch programs
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return Layout(whole, data, root[TENSOR] if inner else None)


def _forget_closed_groups() -> None:
    """Let PyTorch forget how operations were laid out over equal meshes of a run that has ended.

    What it remembers names process groups, which that run has closed.
    """
    from torch.distributed.tensor import _redistribute, debug

    for module, name in (
        (debug, "_clear_sharding_prop_cache"),
        (_redistribute, "clear_redistribute_planner_cache"),
    ):
        clear = getattr(module, name, None)
        if clear is not None:
            clear()


def draw_alike(mesh: DeviceMesh, context: RunContext) -> None:
    """Let the processes of tensor parallelism draw the same random numbers: what they compute alike, stays alike."""
    device = context.device
    states = [torch.get_rng_state(), context.backend.rng_state(device)]
    group = mesh.get_group()
    dist.broadcast_object_list(states, src=dist.get_global_rank(group, 0), group=group, device=device)
    torch.set_rng_state(states[0])
    context.backend.set_rng_state(states[1], device)


def data_mesh(device_type: str, topology: Topology, config: FullyShardedDataParallelPlugin) -> DeviceMesh:
    """Return the mesh over which parameters are sharded: of one dimension, or `(replicate, shard)`.

    Raises:
        ConfigurationError: if the processes cannot be divided into groups as asked for.
    """
    world = topology.world_size
    group = _shard_group(topology, config)
    if world % group:
        raise ConfigurationError(
            f"{world} processes cannot be divided into groups of {group} that shard together",
            hint="a shard_group_size that divides the number of processes",
        )
    if group == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device_type, (world // group, group), mesh_dim_names=(REPLICATE, SHARD))


def _shard_group(topology: Topology, config: FullyShardedDataParallelPlugin) -> int:
    """Return over how many processes parameters are sharded."""
    strategy = config.sharding_strategy
    if strategy is ShardingStrategy.NO_SHARD:
        return 1
    if strategy is not None and strategy.hybrid:
        return config.shard_group_size or topology.local_world_size
    if config.shard_group_size not in (0, topology.world_size):
        raise ConfigurationError(
            f"shard_group_size={config.shard_group_size} is for the hybrid strategies",
            found=f"sharding_strategy={strategy.value if strategy else None}",
            hint="sharding_strategy='HYBRID_SHARD'",
        )
    return topology.world_size
