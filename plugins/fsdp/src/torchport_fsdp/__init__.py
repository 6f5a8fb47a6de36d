"""Fully sharded data parallelism: descriptors only; imports no torch. Public names are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torchport.plugin import CommandSpec, Requirements, StrategySpec, hookimpl, lazy_exports

if TYPE_CHECKING:
    from torchport_fsdp.config import (
        AutoWrapPolicy,
        BackwardPrefetch,
        FullyShardedDataParallelPlugin,
        ShardingStrategy,
        StateDictType,
    )
    from torchport_fsdp.documented import (
        disable_fsdp_ram_efficient_loading,
        enable_fsdp_ram_efficient_loading,
        fsdp2_load_full_state_dict,
        fsdp2_prepare_auto_wrap_policy,
        fsdp2_prepare_model,
        fsdp2_switch_optimizer_parameters,
        get_module_children_bottom_up,
    )
    from torchport_fsdp.merge import merge_fsdp_weights


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer parameters, gradients and optimizer states spread over the processes."""
    yield StrategySpec(
        name="fsdp",
        aliases=("fsdp2",),
        factory="torchport_fsdp.strategy:FsdpStrategy",
        config="torchport_fsdp.config:FullyShardedDataParallelPlugin",
        summary="parameters, gradients and optimizer states spread over the processes (FSDP2, or FSDP1)",
        needs=Requirements(distributed=True),
        distributed_type="FSDP",
        parallelism=("dp_replicate", "dp_shard", "cp", "sp", "tp"),
    )


@hookimpl
def torchport_commands() -> Iterable[CommandSpec]:
    """Offer the tools for sharded checkpoints and older configuration files."""
    yield CommandSpec(
        name="merge-weights",
        factory="torchport_fsdp.commands:merge_weights",
        summary="Merge the weights of a sharded checkpoint into whole files.",
    )
    yield CommandSpec(
        name="to-fsdp2",
        factory="torchport_fsdp.commands:to_fsdp2",
        summary="Rewrite a configuration file for FSDP1 as one for FSDP2.",
    )


_EXPORTS = {
    "AutoWrapPolicy": ".config",
    "BackwardPrefetch": ".config",
    "FullyShardedDataParallelPlugin": ".config",
    "ShardingStrategy": ".config",
    "StateDictType": ".config",
    "disable_fsdp_ram_efficient_loading": ".documented",
    "enable_fsdp_ram_efficient_loading": ".documented",
    "fsdp2_load_full_state_dict": ".documented",
    "fsdp2_prepare_auto_wrap_policy": ".documented",
    "fsdp2_prepare_model": ".documented",
    "fsdp2_switch_optimizer_parameters": ".documented",
    "get_module_children_bottom_up": ".documented",
    "merge_fsdp_weights": ".merge",
}

__all__ = [
    "AutoWrapPolicy",
    "BackwardPrefetch",
    "FullyShardedDataParallelPlugin",
    "ShardingStrategy",
    "StateDictType",
    "disable_fsdp_ram_efficient_loading",
    "enable_fsdp_ram_efficient_loading",
    "fsdp2_load_full_state_dict",
    "fsdp2_prepare_auto_wrap_policy",
    "fsdp2_prepare_model",
    "fsdp2_switch_optimizer_parameters",
    "get_module_children_bottom_up",
    "merge_fsdp_weights",
]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS)
