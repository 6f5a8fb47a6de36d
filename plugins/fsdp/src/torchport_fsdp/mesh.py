"""The mesh of processes over which a run shards and replicates."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchport.errors import ConfigurationError
from torchport.plugin import Topology

from torchport_fsdp.config import FullyShardedDataParallelPlugin, ShardingStrategy

REPLICATE, SHARD = "dp_replicate", "dp_shard"


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
