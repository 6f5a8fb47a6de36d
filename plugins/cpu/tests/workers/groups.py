"""Groups of some processes over MPI, and what PyTorch builds on groups."""

import torch
import torch.distributed as dist
from exact import OTHERS, RANK, SIZE, same


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
