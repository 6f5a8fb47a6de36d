"""The cells of the matrix, and what each must be: layout, precision, accumulation and number of processes.

Imports no torch: the command lists cells and judges results without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROCESSES = (1, 2, 4)
PRECISIONS = ("no", "bf16", "fp16", "fp8")
ACCUMULATIONS = (1, 3)
LAYOUTS = (
    "single", "ddp",
    "fsdp1", "fsdp2 full", "fsdp2 grad-op", "fsdp2 hybrid",
    "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3",
    "fsdp2 x tp", "fsdp2 x cp", "fsdp2 x sp",
)  # fmt: skip

WINDOWS, BATCH, LENGTH = 4, 4, 8
"""Optimizer steps of a cell; sequences and tokens of a micro-batch."""

_ROUNDING = {"no": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp8": 2.0**-4}
_SUM = math.sqrt(BATCH * LENGTH)
_CLIP = 1e-6
TOLERANCE = {
    **{precision: _CLIP + 4 * _ROUNDING[precision] for precision in ("no", "bf16", "fp16")},
    "fp8": _CLIP + 4 * _ROUNDING["bf16"] + 2 * _ROUNDING["fp8"] / _SUM,
}
"""How far a loss may be from the one in float32 in one process, from the largest error u of one rounding.

Between tokens and loss lie about 25 roundings of numbers up to 4, and a loss is the mean over 32 tokens. Errors of
random sign add up to sqrt(25) * 4 * u / sqrt(32), about 4 u, in losses and in the steps before them alike. With fp8,
whose u is 2^-4 (E4M3), inputs and weights of two products in a row are rounded: 2 u / sqrt(32) on top of bf16.
Engines that clip gradients add 1e-6 to the norm at different places, and a clipped step changes a loss by about 1.
"""

WORKS_IN = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""The dtype in which a linear layer gives its results."""

TENSOR_PARALLEL = 16704 / 18128
"""Share of the parameters that are divided by tensor parallelism: those of linear layers in blocks, but two biases."""

_OBJECTS = {
    "single": "Network",
    "ddp": "DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDPNetwork",
    "deepspeed": "DeepSpeedEngine",
}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    layout: str
    precision: str
    accumulation: int
    processes: int

    @property
    def name(self) -> str:
        """Such as `fsdp2 full, bf16, accumulate 3, 2 processes`."""
        return f"{self.layout}, {self.precision}, accumulate {self.accumulation}, {self.processes} processes"

    @property
    def strategy(self) -> str:
        """Name of the strategy, with the version of FSDP."""
        return self.layout.partition(" ")[0]

    @property
    def dimension(self) -> str:
        """What neighbours share a batch for: `tp`, `cp`, `sp`, always in pairs; empty without."""
        return self.layout.partition(" x ")[2]

    @property
    def shares(self) -> int:
        """How many different micro-batches there are at once."""
        return max(1, self.processes // 2) if self.dimension else self.processes

    @property
    def refusal(self) -> str:
        """Part of the reason why the cell is refused; empty if it must run."""
        if self.layout == "single" and self.processes > 1:
            return "it runs on at most 1"
        if self.dimension and self.processes == 1:
            return "the product of all sizes must be the number of processes"
        return ""

    @property
    def may_be_refused(self) -> str:
        """Part of the reason why the cell is refused on some machines."""
        if self.strategy == "deepspeed" and self.precision == "fp16":
            return "DeepSpeed has no fp16"  # on processors without instructions for it
        return ""

    def must_be(self) -> dict[str, Any]:
        """Return what has to be seen of the run: the plan, the objects that train, and what each process holds."""
        whole, part = 1.0, 1 / self.processes
        held = {"fsdp1": part, "fsdp2": part}.get(self.strategy, whole)
        if self.layout == "fsdp2 hybrid":
            held = 1 / max(1, self.processes // 2)
        if self.layout == "deepspeed 3":
            held = part
        expected: dict[str, Any] = {
            "plan": [self.strategy.rstrip("12"), self.precision],
            "model": _OBJECTS[self.strategy],
            "layer": "Float8Linear" if self.precision == "fp8" else "Linear",
            "dtype": [WORKS_IN[self.precision]],
            "held": held,
        }
        if self.dimension:
            shard = f"dp_shard {self.shares} x " * (self.shares > 1)
            expected |= {
                "mesh": f"{shard}{self.dimension} 2",
                "tokens": [LENGTH]
                if self.dimension == "tp"
                else [LENGTH // 2, LENGTH],  # at last, whole ones
            }
            if self.dimension == "tp":
                expected["held"] = (1 - TENSOR_PARALLEL / 2) / self.shares
        elif self.strategy == "fsdp2":
            expected["resharded"] = self.layout != "fsdp2 grad-op"
        if self.strategy == "deepspeed":
            stage = int(self.layout[-1])
            expected |= {"stage": stage, "stepped": part if stage else whole}
        return expected


def cells(processes: int, layouts: Iterable[str] = LAYOUTS) -> list[Cell]:
    """Return the cells for a number of processes."""
    return [
        Cell(layout, precision, accumulation, processes)
        for layout, precision, accumulation in itertools.product(layouts, PRECISIONS, ACCUMULATIONS)
    ]


@dataclass(frozen=True)
class Verdict:
    """What has become of a cell: it `runs`, is `refused`, or `fails`."""

    outcome: str
    text: str
    deviation: float = math.nan


def judge(cell: Cell, ranks: list[dict[str, Any]]) -> Verdict:
    """Judge the results that the processes wrote for a cell."""
    refused = [rank.get("refused", "") for rank in ranks]
    if any(refused):
        wanted = cell.refusal or cell.may_be_refused
        reason = next(filter(None, refused))
        if not all(refused) or not wanted or wanted not in reason:
            return Verdict("fails", f"refused by {sum(map(bool, refused))} of {len(ranks)}: {reason}")
        return Verdict("refused", reason)
    if cell.refusal:
        return Verdict("fails", f"ran, and must be refused: {cell.refusal}")
    for rank in ranks:
        wrong = {
            key: (rank["seen"].get(key), value)
            for key, value in cell.must_be().items()
            if not _same(rank["seen"].get(key), value)
        }
        if wrong:
            return Verdict("fails", f"became something else (found, wanted): {wrong}")
    deviation = max(
        abs(one - other) if math.isfinite(one) else math.inf
        for rank in ranks
        for one, other in zip(rank["losses"], rank["reference"], strict=True)
    )
    if deviation > TOLERANCE[cell.precision]:
        return Verdict("fails", f"a loss is {deviation:.1e} off, tolerance {TOLERANCE[cell.precision]:.1e}")
    if cell.precision != "no" and deviation < TOLERANCE["no"]:
        return Verdict("fails", f"no loss is more than {deviation:.1e} off: it was computed in float32")
    return Verdict("runs", "", deviation)


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return isinstance(found, float) and math.isclose(found, wanted, rel_tol=0.02)  # parts are padded
    return bool(found == wanted)
