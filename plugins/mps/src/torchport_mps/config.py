"""Settings of the backend `mps`. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from torchport.plugin import setting

FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"


@dataclass
class MpsSettings:
    """How the GPU computes."""

    __torchport_prefix__: ClassVar[str] = "mps"

    fallback: str = setting(
        "",
        help="Compute on the processor what PyTorch has not for the GPU; PyTorch reads it when it is imported.",
        choices=("0", "1"),
        env=FALLBACK,
    )
