"""Every operation of the MPI process group against exact values. Prints `ok <check>` for each check that held."""

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
from job import join, raises, say
from torchport.errors import OperationError, UnsupportedOperationError
from torchport_cpu.mpi_group import MpiProcessGroup

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


def check_broadcast():
    for dtype, root, make in itertools.product(MOVABLE, OTHERS, (lambda t: t, strided)):
        if dtype == torch.float8_e4m3fn and make is strided:
            continue
        tensor = make(values(RANK, dtype))
        dist.broadcast(tensor, root)
        same(tensor.contiguous(), values(root, dtype))


def check_reduce():
    for dtype, root in itertools.product((torch.float32, torch.bfloat16, torch.int8), OTHERS):
        tensor = strided(values(RANK, dtype))
        dist.reduce(tensor, root)
        total = sum(values(r, torch.float32) for r in OTHERS).to(dtype)
        same(tensor.contiguous(), total if root == RANK else values(RANK, dtype))


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


def check_send_and_receive():
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for dtype in MOVABLE:
        if RANK % 2 == 0:
            dist.send(values(RANK, dtype), after)
            tensor = torch.empty_like(values(0, dtype))
            dist.recv(tensor, before)
        else:
            tensor = torch.empty_like(values(0, dtype))
            dist.recv(tensor, before)
            dist.send(values(RANK, dtype), after)
        same(tensor, values(before, dtype))


def check_receive_from_any_rank_tells_the_rank():
    if RANK == 0:
        seen = set()
        for _ in range(SIZE - 1):
            tensor = torch.zeros(1)
            source = dist.recv(tensor, tag=7)
            same(tensor, torch.tensor([float(source)]))
            seen.add(source)
        assert seen == set(range(1, SIZE)), seen
    else:
        dist.send(torch.tensor([float(RANK)]), 0, tag=7)


def check_messages_of_different_tags_do_not_mix():
    if RANK == 0:
        works = [dist.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in (1, 2)]
        for work in works:
            work.wait()
    elif RANK == 1:
        second, first = torch.zeros(1), torch.zeros(1)
        dist.recv(second, 0, tag=2)
        dist.recv(first, 0, tag=1)
        assert (first.item(), second.item()) == (1.0, 2.0)


def check_batched_point_to_point_does_not_deadlock():
    # Every rank sends first, and more than MPI buffers.
    count = 300_000
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    tensor = torch.zeros(count)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, torch.full((count,), float(RANK)), after),
            dist.P2POp(dist.irecv, tensor, before),
        ]
    )
    for work in works:
        work.wait()
    same(tensor, torch.full((count,), float(before)))


def check_a_message_of_another_size_is_an_error():
    if RANK == 0:
        dist.send(torch.ones(2), 1)
    elif RANK == 1:
        raises(OperationError, lambda: dist.recv(torch.ones(3), 0), "recv from 0", "8 bytes", "12 bytes")


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


def check_asynchronous_operations():
    tensors = [torch.full((1000,), float(RANK + index)) for index in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for index, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is tensor
        same(tensor, torch.full((1000,), float(sum(OTHERS) + SIZE * index)))


def check_futures_complete_without_anybody_waiting_on_the_work():
    tensor = torch.ones(4) * (RANK + 1)
    future = dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0] * 2)
    same(future.wait(), torch.full((4,), float(sum(r + 1 for r in OTHERS) * 2)))
    outputs = [torch.zeros(2) for _ in OTHERS]
    future = dist.all_gather(outputs, torch.full((2,), float(RANK)), async_op=True).get_future()
    assert [t[0].item() for t in future.wait()] == [float(r) for r in OTHERS]


def check_a_callback_may_start_another_operation():
    tensor = torch.ones(3)

    def again(done):
        value = done.value()[0]
        dist.all_reduce(value)
        return value

    same(
        dist.all_reduce(tensor, async_op=True).get_future().then(again).wait(),
        torch.full((3,), float(SIZE**2)),
    )


def check_coalescing():
    for device in (None, torch.device("cpu")):
        tensors = [torch.full((3,), float(RANK + index)) for index in range(3)]
        with dist._coalescing_manager(device=device, async_ops=True) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        manager.wait()
        for index, tensor in enumerate(tensors):
            same(tensor, torch.full((3,), float(sum(OTHERS) + SIZE * index)))
    tensor = torch.ones(2)
    dist.all_reduce(tensor)  # nothing stays queued
    same(tensor, torch.full((2,), float(SIZE)))


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


def check_subgroups():
    last = dist.new_group([SIZE - 1, 0])
    alone = [dist.new_group([rank]) for rank in OTHERS]
    if RANK in (0, SIZE - 1):
        assert dist.get_world_size(last) == 2
        assert dist.get_process_group_ranks(last) == sorted((0, SIZE - 1))
        tensor = torch.full((2,), float(RANK + 1))
        dist.all_reduce(tensor, group=last)
        same(tensor, torch.full((2,), float(SIZE + 1)))
        tensor = torch.full((2,), float(RANK))
        dist.broadcast(tensor, SIZE - 1, group=last)
        same(tensor, torch.full((2,), float(SIZE - 1)))
    tensor = torch.full((2,), 5.0)
    dist.all_reduce(tensor, group=alone[RANK])
    same(tensor, torch.full((2,), 5.0))
    dist.destroy_process_group(alone[RANK])


def check_groups_may_be_used_in_different_orders():
    # With blocking MPI calls, one rank would wait in the first group and the other in the second.
    groups = [dist.new_group(list(OTHERS)) for _ in range(2)]
    tensors = [torch.ones(2), torch.ones(2)]
    order = (0, 1) if RANK == 0 else (1, 0)
    works = [dist.all_reduce(tensors[index], group=groups[index], async_op=True) for index in order]
    for work in works:
        work.wait()
    assert all(tensor.equal(torch.full((2,), float(SIZE))) for tensor in tensors)


def check_functional_collectives_and_meshes():
    import torch.distributed._functional_collectives as funcol
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (SIZE,))
    same(funcol.all_reduce(torch.ones(2), "sum", mesh).wait(), torch.full((2,), float(SIZE)))
    gathered = funcol.all_gather_tensor(torch.full((1, 2), float(RANK)), 0, mesh)
    same(gathered.wait(), torch.arange(float(SIZE)).reshape(SIZE, 1).expand(SIZE, 2).contiguous())
    scattered = funcol.reduce_scatter_tensor(torch.ones(SIZE, 2), "sum", 0, mesh)
    same(scattered.wait(), torch.full((1, 2), float(SIZE)))
    exchanged = funcol.all_to_all_single(torch.full((SIZE,), float(RANK)), None, None, mesh)
    same(exchanged.wait(), torch.arange(float(SIZE)))
    same(funcol.broadcast(torch.full((2,), float(RANK)), 0, mesh).wait(), torch.zeros(2))
    whole = torch.arange(float(4 * SIZE)).reshape(2 * SIZE, 2)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    same(sharded.to_local(), whole[2 * RANK : 2 * RANK + 2])
    same(sharded.full_tensor(), whole)
    same(sharded.redistribute(mesh, [Shard(1 if SIZE == 2 else 0)]).full_tensor(), whole)
    partial = DTensor.from_local(torch.ones(2), mesh, [dist.tensor.Partial()])
    same(partial.redistribute(mesh, [Replicate()]).to_local(), torch.full((2,), float(SIZE)))
    grid = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicate", "shard"))
    same(funcol.all_reduce(torch.ones(1), "sum", (grid, 1)).wait(), torch.full((1,), float(SIZE)))


for name, check in list(globals().items()):
    if name.startswith("check_"):
        check()
        say("ok", RANK, name)
        dist.barrier()
collectives.close()
assert not dist.is_initialized()
collectives, _ = join()  # the process group can be opened again
tensor = torch.ones(1)
dist.all_reduce(tensor)
same(tensor, torch.full((1,), float(SIZE)))
say("ok", RANK, "reopen")
collectives.close()
