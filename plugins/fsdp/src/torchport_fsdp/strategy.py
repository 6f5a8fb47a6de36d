"""The strategy `fsdp`: its version is a setting."""

from __future__ import annotations

from typing import Any

from torchport.plugin import StrategySpec

from torchport_fsdp.config import FullyShardedDataParallelPlugin
from torchport_fsdp.version2 import FullyShardStrategy


class FsdpStrategy(FullyShardStrategy):
    """FSDP2; making one with settings for the first version gives an FSDP1 instead."""

    def __new__(cls, spec: StrategySpec, config: FullyShardedDataParallelPlugin | None = None) -> Any:
        """Choose the version that the settings ask for."""
        if config is not None and config.fsdp_version == 1:
            from torchport_fsdp.version1 import FlatParameterStrategy

            return FlatParameterStrategy(spec, config)
        return super().__new__(cls)
