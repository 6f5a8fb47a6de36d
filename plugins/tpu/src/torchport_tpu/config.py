"""Settings of the backends and of the strategy. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchport.plugin import setting

virtual_devices = False
"""Whether the plan resolved last asks for one program over all devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XlaPlugin:
    """How torch_xla works."""

    downcast_bf16: bool = setting(
        False,
        help="Hold float32 as bfloat16 on the device, and float64 as float32 (torch_xla's XLA_DOWNCAST_BF16).",
        env="ACCELERATE_DOWNCAST_BF16",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpmdPlugin:
    """How one program is spread over devices."""

    __torchport_prefix__ = "spmd"

    sharding: str = setting(
        "fsdp",
        help="What is spread besides batches: fsdp, also parameters, gradients and optimizer states; data, nothing.",
        choices=("fsdp", "data"),
    )
    min_num_params: int = setting(
        0, help="Parameters with fewer elements than this are held whole on every device."
    )
