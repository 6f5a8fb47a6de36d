"""Operations over MPI that move tensors from and to every process, against exact values."""

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
from exact import MOVABLE, OTHERS, RANK, SIZE, collectives, same, strided, values
from job import raises
from torchport.errors import OperationError


def check_broadcast():
    for dtype, root, make in itertools.product(MOVABLE, OTHERS, (lambda t: t, strided)):
        if dtype == torch.float8_e4m3fn and make is strided:
            continue
        tensor = make(values(RANK, dtype))
        dist.broadcast(tensor, root)
        same(tensor.contiguous(), values(root, dtype))


def check_all_gather():
    for dtype in MOVABLE:
        outputs = [torch.empty_like(values(0, dtype)) for _ in OTHERS]
        dist.all_gather(outputs, values(RANK, dtype))
        for rank, output in enumerate(outputs):
            same(output, values(rank, dtype))
    outputs = [strided(torch.zeros(2, 3)) for _ in OTHERS]
    dist.all_gather(outputs, strided(values(RANK, torch.float32)))
    for rank, output in enumerate(outputs):
        same(output.contiguous(), values(rank, torch.float32))


def check_all_gather_of_uneven_tensors():
    outputs = [torch.zeros(rank + 1) for rank in OTHERS]
    dist.all_gather(outputs, torch.full((RANK + 1,), float(RANK)))
    for rank, output in enumerate(outputs):
        same(output, torch.full((rank + 1,), float(rank)))


def check_all_gather_into_tensor():
    every = torch.cat([values(r, torch.float32) for r in OTHERS])
    output = torch.empty_like(every)
    dist.all_gather_into_tensor(output, values(RANK, torch.float32))
    same(output, every)
    output = torch.empty_like(every)  # as FSDP does: the input is this rank's part of the output
    part = output.narrow(0, RANK * 2, 2).copy_(values(RANK, torch.float32))
    dist.all_gather_into_tensor(output, part)
    same(output, every)
    group, output = dist.group.WORLD, torch.empty_like(every)
    group._allgather_base(output, values(RANK, torch.float32)).wait()
    same(output, every)
    outputs = [torch.empty_like(every), torch.empty_like(every, dtype=torch.int32)]
    inputs = [values(RANK, torch.float32), values(RANK, torch.int32)]
    group.allgather_into_tensor_coalesced(outputs, inputs).wait()
    same(outputs[0], every)
    same(outputs[1], every.to(torch.int32))


def check_all_gather_coalesced():
    inputs = [values(RANK, torch.float32), values(RANK, torch.float32, (4,))]
    lists = [[torch.zeros(2, 3), torch.zeros(4)] for _ in OTHERS]
    dist.all_gather_coalesced(lists, inputs)
    for rank, row in enumerate(lists):
        same(row[0], values(rank, torch.float32))
        same(row[1], values(rank, torch.float32, (4,)))


def check_gather_and_scatter():
    for dtype, root in itertools.product(MOVABLE, OTHERS):
        outputs = [torch.empty_like(values(0, dtype)) for _ in OTHERS] if root == RANK else None
        dist.gather(values(RANK, dtype), outputs, dst=root)
        for rank, output in enumerate(outputs or ()):
            same(output, values(rank, dtype))
        output = torch.empty_like(values(0, dtype))
        dist.scatter(output, [values(r, dtype) for r in OTHERS] if root == RANK else None, src=root)
        same(output, values(RANK, dtype))
    output = strided(torch.zeros(2, 3))
    dist.scatter(output, [strided(values(r, torch.float32)) for r in OTHERS] if RANK == 0 else None, src=0)
    same(output.contiguous(), values(RANK, torch.float32))


def check_all_to_all():
    outputs = [torch.zeros(SIZE - RANK + rank) for rank in OTHERS]
    inputs = [torch.full((SIZE - rank + RANK,), float(10 * RANK + rank)) for rank in OTHERS]
    dist.all_to_all(outputs, inputs)
    for rank, output in enumerate(outputs):
        same(output, torch.full((SIZE - RANK + rank,), float(10 * rank + RANK)))


def check_all_to_all_single():
    for dtype in MOVABLE:
        source = values(RANK, dtype, (2 * SIZE, 3))
        output = torch.empty_like(source)
        dist.all_to_all_single(output, source)
        wanted = torch.cat([values(r, torch.float32, (2 * SIZE, 3))[2 * RANK : 2 * RANK + 2] for r in OTHERS])
        same(output, wanted.to(dtype))


def check_all_to_all_single_with_uneven_splits():
    # Rank r sends r + s rows to rank s; with three ranks, rank 0 sends none to itself.
    sent = [RANK + rank for rank in OTHERS]
    source = torch.cat([torch.full((n, 2), 10.0 * RANK + rank) for rank, n in enumerate(sent)])
    received = [rank + RANK for rank in OTHERS]
    output = torch.empty(sum(received), 2)
    dist.all_to_all_single(output, source, received, sent)
    same(output, torch.cat([torch.full((n, 2), 10.0 * rank + RANK) for rank, n in enumerate(received)]))
    wrong = [1] * (SIZE + 1)
    raises(OperationError, lambda: dist.group.WORLD.alltoall_base(output, source, wrong, sent), "split sizes")


def check_empty_tensors():
    tensor = torch.zeros(0, 3)
    dist.all_reduce(tensor)
    dist.broadcast(tensor, 0)
    outputs = [torch.zeros(0, 3) for _ in OTHERS]
    dist.all_gather(outputs, tensor)
    assert all(output.shape == (0, 3) for output in outputs)


def check_barrier():
    dist.barrier()
    work = dist.barrier(async_op=True)
    work.wait(timedelta(seconds=20))
    assert work.is_completed()


def check_inference_mode():
    with torch.inference_mode():
        tensor = torch.ones(3, dtype=torch.bfloat16)
        work = dist.all_reduce(tensor, async_op=True)
        outputs = [torch.zeros(1) for _ in OTHERS]
        gathered = dist.all_gather(outputs, torch.full((1,), float(RANK)), async_op=True)
    work.get_future().wait()
    gathered.get_future().wait()
    same(tensor, torch.full((3,), float(SIZE), dtype=torch.bfloat16))
    assert [output.item() for output in outputs] == [float(r) for r in OTHERS]


def check_objects():
    mine = {"rank": RANK, "text": "x" * (RANK * 1000)}
    everybody = [{"rank": r, "text": "x" * (r * 1000)} for r in OTHERS]
    gathered = [None] * SIZE
    dist.all_gather_object(gathered, mine)
    assert gathered == everybody
    gathered = [None] * SIZE if RANK == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    assert gathered == (everybody if RANK == 0 else None)
    values = [mine, RANK]
    dist.broadcast_object_list(values, src=SIZE - 1)
    assert values == [everybody[-1], SIZE - 1]
    output = [None]
    dist.scatter_object_list(output, everybody if RANK == 0 else None, src=0)
    assert output == [mine]


def check_the_interface_of_collectives():
    same(collectives.all_reduce(torch.ones(2), "max"), torch.ones(2))
    same(collectives.all_gather(torch.full((1,), float(RANK))), torch.arange(float(SIZE)))
    same(collectives.reduce_scatter(torch.ones(SIZE, 2)), torch.full((1, 2), float(SIZE)))
    same(collectives.broadcast(torch.full((2,), float(RANK)), SIZE - 1), torch.full((2,), float(SIZE - 1)))
    assert collectives.all_gather_object(RANK) == list(OTHERS)
    collectives.barrier()
