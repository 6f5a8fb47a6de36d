"""Operations over MPI that nobody waits for at once."""

import torch
import torch.distributed as dist
from exact import OTHERS, RANK, SIZE, same


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
