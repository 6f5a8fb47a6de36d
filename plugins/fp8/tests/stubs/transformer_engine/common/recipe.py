"""Recipes, with the documented arguments and defaults."""

import enum
from collections.abc import Callable
from dataclasses import dataclass


class Format(enum.Enum):
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None


@dataclass
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3
