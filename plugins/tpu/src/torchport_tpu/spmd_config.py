"""Settings of the strategy `spmd`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchport.plugin import setting


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
