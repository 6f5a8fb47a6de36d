"""Messages from one process to another over MPI."""

import torch
import torch.distributed as dist
from exact import MOVABLE, RANK, SIZE, same, values
from job import raises
from torchport.errors import OperationError


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
