"""Sums, products and the like over MPI, against exact values."""

import itertools

import torch
import torch.distributed as dist
from exact import FLOATS, INTEGERS, OTHERS, RANK, SIZE, Op, same, strided, values
from job import raises
from torchport.errors import UnsupportedOperationError
from torchport_cpu.mpi_group import MpiProcessGroup


def check_the_group_is_ours():
    group = dist.group.WORLD
    assert isinstance(group, MpiProcessGroup)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (RANK, SIZE, "torchport_mpi")
    assert (group.name(), group.rank(), group.size()) == ("torchport_mpi", RANK, SIZE)


def check_all_reduce():
    stack = {d: torch.stack([values(r, torch.float64) for r in OTHERS]) for d in FLOATS + INTEGERS}
    for dtype in FLOATS + INTEGERS:
        every = stack[dtype]
        expected = {
            Op.SUM: every.sum(0),
            Op.PRODUCT: every.prod(0),
            Op.MIN: every.amin(0),
            Op.MAX: every.amax(0),
        }
        for op, wanted in expected.items():
            for make in (lambda t: t, strided):
                tensor = make(values(RANK, dtype))
                dist.all_reduce(tensor, op)
                same(tensor.contiguous(), wanted.to(dtype))
        if dtype.is_floating_point:
            tensor = values(RANK, dtype)
            dist.all_reduce(tensor, Op.AVG)
            same(
                tensor,
                (every.sum(0).to(torch.float64) / SIZE).to(torch.float32).to(dtype)
                if dtype != torch.float64
                else every.sum(0) / SIZE,
            )
    for dtype in INTEGERS:
        for op, step in (
            (Op.BAND, torch.bitwise_and),
            (Op.BOR, torch.bitwise_or),
            (Op.BXOR, torch.bitwise_xor),
        ):
            tensor, wanted = values(RANK, dtype), values(0, dtype)
            for rank in range(1, SIZE):
                wanted = step(wanted, values(rank, dtype))
            dist.all_reduce(tensor, op)
            same(tensor, wanted)


def check_16_bit_sums_are_rounded_once():
    # In bfloat16 arithmetic 256 + 1 + 1 is 256: each step rounds back. In float32 it is 258.
    tensor = torch.tensor([256.0 if RANK == 0 else 1.0], dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    same(tensor, torch.tensor([256.0 + SIZE - 1]).to(torch.bfloat16))
    tensor = torch.tensor([2048.0 if RANK == 0 else 1.0], dtype=torch.float16)
    dist.all_reduce(tensor)
    same(tensor, torch.tensor([2048.0 + SIZE - 1]).to(torch.float16))


def check_all_reduce_of_booleans():
    mine = torch.tensor([False, RANK == 0, True])
    for op, wanted in (
        (Op.SUM, [False, True, True]), (Op.MAX, [False, True, True]), (Op.BOR, [False, True, True]),
        (Op.PRODUCT, [False, False, True]), (Op.MIN, [False, False, True]), (Op.BAND, [False, False, True]),
        (Op.BXOR, [False, True, SIZE % 2 == 1]),
    ):  # fmt: skip
        tensor = mine.clone()
        dist.all_reduce(tensor, op)
        same(tensor, torch.tensor(wanted))


def check_all_reduce_of_complex_numbers():
    for dtype in (torch.complex64, torch.complex128):
        tensor = torch.tensor([complex(RANK, 1)], dtype=dtype)
        dist.all_reduce(tensor)
        same(tensor, torch.tensor([complex(sum(OTHERS), SIZE)], dtype=dtype))
        tensor = torch.tensor([1j], dtype=dtype)
        options = dist.AllreduceOptions()
        options.reduceOp = Op.PRODUCT
        dist.group.WORLD.allreduce([tensor], options).wait()
        same(tensor, torch.tensor([1j**SIZE], dtype=dtype))


def check_reductions_that_mpi_has_not_are_refused():
    def refuse(op, dtype, *words):
        raises(UnsupportedOperationError, lambda: dist.all_reduce(torch.ones(2).to(dtype), op), *words)

    refuse(Op.AVG, torch.int32, "AVG", "integers")
    refuse(Op.BAND, torch.float32, "BAND", "integers")
    refuse(Op.SUM, torch.float8_e4m3fn, "float8_e4m3fn")
    refuse(dist._make_nccl_premul_sum(2.0), torch.float32, "PREMUL_SUM")
    raises(UnsupportedOperationError, lambda: dist.broadcast(torch.eye(2).to_sparse(), 0), "dense")
    raises(UnsupportedOperationError, lambda: dist.group.WORLD.monitored_barrier(), "monitored_barrier")


def check_all_reduce_coalesced():
    tensors = [values(RANK, d) for d in (torch.float32, torch.int64, torch.bfloat16)]
    dist.all_reduce_coalesced(tensors[:1])
    same(tensors[0], sum(values(r, torch.float32) for r in OTHERS))
    dist.group.WORLD.allreduce_coalesced(tensors[1:]).wait()
    same(tensors[1], sum(values(r, torch.int64) for r in OTHERS))
    same(tensors[2], sum(values(r, torch.float32) for r in OTHERS).to(torch.bfloat16))


def check_reduce():
    for dtype, root in itertools.product((torch.float32, torch.bfloat16, torch.int8), OTHERS):
        tensor = strided(values(RANK, dtype))
        dist.reduce(tensor, root)
        total = sum(values(r, torch.float32) for r in OTHERS).to(dtype)
        same(tensor.contiguous(), total if root == RANK else values(RANK, dtype))


def check_reduce_scatter():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        total = sum(values(r, torch.float64, (2 * SIZE, 3)) for r in OTHERS)
        mine = total[2 * RANK : 2 * RANK + 2].to(dtype)
        source = values(RANK, dtype, (2 * SIZE, 3))
        for make in (lambda t: t, strided):
            output = make(torch.zeros(2, 3, dtype=dtype))
            dist.reduce_scatter(output, [make(part) for part in source.chunk(SIZE)])
            same(output.contiguous(), mine)
            output = make(torch.zeros(2, 3, dtype=dtype))
            dist.reduce_scatter_tensor(output, make(source))
            same(output.contiguous(), mine)
        group, output = dist.group.WORLD, torch.zeros(2, 3, dtype=dtype)
        group._reduce_scatter_base(output, source.clone()).wait()
        same(output, mine)
        outputs = [torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)]
        group.reduce_scatter_tensor_coalesced(outputs, [source.clone(), source.clone()]).wait()
        same(outputs[0], mine)
        same(outputs[1], mine)
    output = torch.zeros(2, 3)
    dist.reduce_scatter_tensor(output, values(RANK, torch.float32, (2 * SIZE, 3)), op=Op.AVG)
    same(
        output, (sum(values(r, torch.float32, (2 * SIZE, 3)) for r in OTHERS) / SIZE)[2 * RANK : 2 * RANK + 2]
    )


def check_reduce_scatter_of_uneven_tensors():
    parts = [torch.full((rank + 1,), float(RANK + rank)) for rank in OTHERS]
    output = torch.zeros(RANK + 1)
    dist.reduce_scatter(output, parts)
    same(output, torch.full((RANK + 1,), float(sum(OTHERS) + SIZE * RANK)))
