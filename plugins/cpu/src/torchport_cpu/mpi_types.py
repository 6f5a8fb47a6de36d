"""Tensors as MPI buffers, and reductions as MPI operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchport.errors import OperationError, UnsupportedOperationError

_DATATYPES = {
    torch.uint8: "UINT8_T",
    torch.uint16: "UINT16_T",
    torch.uint32: "UINT32_T",
    torch.uint64: "UINT64_T",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.complex64: "C_FLOAT_COMPLEX",
    torch.complex128: "C_DOUBLE_COMPLEX",
}
"""MPI's name of the type in which each dtype is reduced."""

_WIRE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.uint8}
"""The dtype in which elements travel for a reduction, for dtypes that MPI cannot add.

16-bit floats are reduced in float32 and rounded once, at the end. Booleans are 0 or 1.
"""

_ARITHMETIC = {
    "SUM": "SUM",
    "AVG": "SUM",
    "PRODUCT": "PROD",
    "MIN": "MIN",
    "MAX": "MAX",
    "BAND": "BAND",
    "BOR": "BOR",
    "BXOR": "BXOR",
}
_LOGICAL = {**_ARITHMETIC, "SUM": "MAX", "PRODUCT": "MIN"}
"""Booleans: a sum says whether any is true, a product whether all are."""

_BITWISE = frozenset({"BAND", "BOR", "BXOR"})
_ORDERED = frozenset({"MIN", "MAX"})


@dataclass(frozen=True, slots=True)
class Reduction:
    """How a `torch.distributed.ReduceOp` over one dtype is done in MPI.

    Attributes:
        op: The `MPI.Op`.
        datatype: The `MPI.Datatype` of an element on the wire.
        wire: The dtype of an element on the wire.
        divisor: What the result is divided by before it is rounded to the tensor's own dtype.
    """

    op: Any
    datatype: Any
    wire: torch.dtype
    divisor: int

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements of `tensor` contiguous in the wire's dtype: its own memory where that fits."""
        return tensor.detach().to(self.wire).contiguous()

    def finish(self, packed: torch.Tensor) -> None:
        """Divide, for an average."""
        if self.divisor != 1:
            packed.div_(self.divisor)


def reduction(mpi: Any, op: Any, dtype: torch.dtype, size: int) -> Reduction:
    """Return how to reduce elements of `dtype` by `op` over `size` processes.

    Raises:
        UnsupportedOperationError: if MPI has no such reduction.
    """
    name = next((n for n in _ARITHMETIC if op == getattr(dist.ReduceOp, n)), "")
    if not name:
        raise UnsupportedOperationError(
            f"MPI collectives have no reduction {op!r}",
            hint=f"one of {', '.join(_ARITHMETIC)}; multiply before an ordinary SUM instead of PREMUL_SUM",
        )
    wire = _WIRE.get(dtype, dtype)
    floating = dtype.is_floating_point or dtype.is_complex
    reason = ""
    if wire not in _DATATYPES:
        reason = f"MPI has no type for {dtype}"
    elif name in _BITWISE and floating:
        reason = "bits are combined in integers and booleans only"
    elif name in _ORDERED and dtype.is_complex:
        reason = "complex numbers have no order"
    elif name == "AVG" and not floating:
        reason = "an average of integers is not an integer: use SUM"
    if reason:
        raise UnsupportedOperationError(f"MPI collectives cannot reduce {dtype} by {name}", reason=reason)
    table = _LOGICAL if dtype == torch.bool else _ARITHMETIC
    return Reduction(
        op=getattr(mpi, table[name]),
        datatype=getattr(mpi, _DATATYPES[wire]),
        wire=wire,
        divisor=size if name == "AVG" else 1,
    )


def check_tensors(operation: str, *tensors: torch.Tensor) -> None:
    """Refuse tensors that MPI cannot read.

    Raises:
        UnsupportedOperationError: if one is not a dense tensor on the CPU.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise UnsupportedOperationError(
                f"{operation} over MPI wants dense tensors on the CPU",
                found=f"{tensor.layout} on {tensor.device}",
            )


def check_size(operation: str, what: str, found: int, wanted: int) -> None:
    """Refuse buffers whose numbers of elements do not fit together.

    Raises:
        OperationError: if `found` is not `wanted`.
    """
    if found != wanted:
        raise OperationError(f"{operation}: {what}", found=str(found), reason=f"{wanted} would fit")


def address(mpi: Any, tensor: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor as an MPI buffer."""
    return mpi.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def as_bytes(mpi: Any, tensor: torch.Tensor) -> list[Any]:
    """Describe a contiguous tensor to MPI as bytes."""
    return [address(mpi, tensor), tensor.numel() * tensor.element_size(), mpi.BYTE]


def as_parts(mpi: Any, tensor: torch.Tensor, counts: Sequence[int]) -> list[Any]:
    """Describe a contiguous tensor to MPI as consecutive parts of `counts` elements each."""
    sizes = [count * tensor.element_size() for count in counts]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [address(mpi, tensor), (sizes, starts), mpi.BYTE]


def as_elements(mpi: Any, tensor: torch.Tensor, datatype: Any) -> list[Any]:
    """Describe a contiguous tensor to MPI as elements to compute with."""
    return [address(mpi, tensor), tensor.numel(), datatype]


def disjoint(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return `source`, or a copy of it where its memory overlaps that of `target`: MPI forbids aliases."""
    start, end = source.data_ptr(), source.data_ptr() + source.numel() * source.element_size()
    other, other_end = target.data_ptr(), target.data_ptr() + target.numel() * target.element_size()
    return source.clone() if start < other_end and other < end else source


def writer(target: torch.Tensor, staged: torch.Tensor) -> Callable[[], None] | None:
    """Return what writes `staged` into `target`; `None` where both are the same memory already."""
    if staged.data_ptr() == target.data_ptr() and staged.dtype == target.dtype and target.is_contiguous():
        return None
    destination = target.detach()

    def write() -> None:
        destination.copy_(staged.view(destination.shape))

    return write
