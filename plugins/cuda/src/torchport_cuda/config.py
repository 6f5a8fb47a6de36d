"""Settings of the backend `cuda`. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from torchport.plugin import setting


@dataclass
class CudaSettings:
    """How GPUs compute."""

    __torchport_prefix__: ClassVar[str] = "cuda"

    tf32: bool | None = setting(
        None, help="Let products of float32 matrices and convolutions use TF32; not given: as PyTorch does."
    )
