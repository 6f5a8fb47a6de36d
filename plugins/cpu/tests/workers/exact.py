"""What the checks of operations share: the opened collectives, values, and exact equality."""

import torch
import torch.distributed as dist
from job import join

Op = dist.ReduceOp
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOVABLE = (*INTEGERS, *FLOATS, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn)

collectives, place = join()
RANK, SIZE = place.rank, place.world_size
OTHERS = range(SIZE)


def same(found, expected):
    """Exact equality of values, dtype and shape."""
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    equal = (
        found.view(torch.uint8).equal(expected.view(torch.uint8))
        if found.dtype == torch.float8_e4m3fn
        else (found.equal(expected))
    )
    assert equal, f"rank {RANK}: found {found}, expected {expected}"


def values(rank, dtype, shape=(2, 3)):
    """Small integers, exact in every dtype, different on every rank and at every place."""
    count = torch.Size(shape).numel()
    return (torch.arange(count).reshape(shape) % 5 + rank + 1).to(dtype)


def strided(tensor):
    """The same values in memory that is not contiguous."""
    wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] * 2), dtype=tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view
