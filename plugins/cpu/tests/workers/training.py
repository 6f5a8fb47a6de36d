"""Trains the same small model in several ways over the same data. Prints `ok <check>` for each that held."""

import torch
import torch.distributed as dist
from job import join, say
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH = 6, 12


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def batches(rank=0, size=1):
    """This rank's part of every batch; equal parts, so that the mean of means is the mean."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, 8, generator=generator)
        targets = torch.randn(BATCH, 4, generator=generator)
        yield inputs.chunk(size)[rank], targets.chunk(size)[rank]


def train(model, rank=0, size=1):
    """Return the mean loss over ranks of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for inputs, targets in batches(rank, size):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean, dist.ReduceOp.SUM)
            mean /= size
        losses.append(mean)
    return torch.stack(losses)


def close_to(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


reference = build()
expected = train(reference)
weights = [p.detach().clone() for p in reference.parameters()]
assert expected[-1] < expected[0]

collectives, place = join("mpi")
rank, size = place.rank, place.world_size

model = DistributedDataParallel(build())
mpi = train(model, rank, size)
close_to(mpi, expected)
for parameter, wanted in zip(model.parameters(), weights, strict=True):
    close_to(parameter.detach(), wanted)
say("ok", rank, "ddp over mpi equals one process")

model = build()
for layer in (model[0], model[2]):
    fully_shard(layer)
fully_shard(model)
close_to(train(model, rank, size), expected)
for parameter, wanted in zip(model.parameters(), weights, strict=True):
    close_to(whole(parameter), wanted)
say("ok", rank, "fully_shard over mpi equals one process")

model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"))
close_to(train(model, rank, size), expected)
with FullyShardedDataParallel.summon_full_params(model):
    for parameter, wanted in zip(model.parameters(), weights, strict=True):
        close_to(parameter.detach(), wanted)
say("ok", rank, "fsdp1 over mpi equals one process")

model = DistributedDataParallel(build())
model.register_comm_hook(None, fp16_compress_hook)
compressed = train(model, rank, size)
assert compressed[-1] < expected[0]
say("ok", rank, "a communication hook runs over mpi")
collectives.close()

collectives, _ = join("gloo")
gloo = train(DistributedDataParallel(build()), rank, size)
close_to(mpi, gloo)
say("ok", rank, "ddp over mpi equals ddp over gloo")
collectives.close()
