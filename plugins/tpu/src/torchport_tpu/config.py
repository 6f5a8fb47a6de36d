"""Settings of the backends over torch_xla. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchport.plugin import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class XlaPlugin:
    """How torch_xla works."""

    downcast_bf16: bool = setting(
        False,
        help="Hold float32 as bfloat16 on the device, and float64 as float32 (torch_xla's XLA_DOWNCAST_BF16).",
        env="ACCELERATE_DOWNCAST_BF16",
    )
