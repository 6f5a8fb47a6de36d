"""Settings of the backend `hpu`. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from torchport.plugin import setting

LAZY = "PT_HPU_LAZY_MODE"


@dataclass
class HpuSettings:
    """How Gaudi computes."""

    __torchport_prefix__: ClassVar[str] = "hpu"

    lazy_mode: str = setting(
        "",
        help="Record operations and run them as graphs (1), or each at once (0); read when PyTorch is imported.",
        choices=("0", "1"),
        env=LAZY,
    )
    graphs: bool = setting(
        False, help="Capture models that are prepared for evaluation in HPU graphs: lazy mode, static shapes."
    )
