"""Four processes, each on a device of its own, train as one process on the host does with all of their batches."""

import torch
import torch.distributed as dist
from checks import run_checks
from torch import nn
from torchport import Accelerator
from torchport.state import AcceleratorState

RANKS, BATCH, STEPS = 4, 2, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(RANKS * BATCH, 6, generator=generator)
    return inputs, torch.randint(0, 3, (RANKS * BATCH,), generator=generator)


def on_the_host() -> list[float]:
    model, losses = network(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(STEPS):
        inputs, labels = batch(number)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def on_devices(strategy: str) -> tuple[list[float], str]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy=strategy)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    rank, losses = accelerator.process_index, []
    for number in range(STEPS):
        inputs, labels = (
            part.to(accelerator.device)[rank * BATCH : (rank + 1) * BATCH] for part in batch(number)
        )
        loss = nn.functional.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    kind = type(next(model.parameters()).data).__name__
    return losses, kind


def check_each_process_has_a_device_of_its_own(folder):
    accelerator = Accelerator()
    rank = accelerator.process_index
    assert (str(accelerator.device), torch.sim.current_device()) == (f"sim:{rank}", rank)
    assert accelerator.plan["collectives"].name == "simccl"
    assert str(accelerator.distributed_type) == "MULTI_SIM"
    assert accelerator.gather(torch.tensor([rank], device=accelerator.device)).tolist() == [0, 1, 2, 3]
    name = torch.sim.get_device_name()
    assert name == f"Simulated device {rank}"


def check_losses_under_ddp_are_those_of_the_host(folder):
    losses, _ = on_devices("ddp")
    assert max(abs(a - b) for a, b in zip(losses, on_the_host(), strict=True)) < 1e-6, losses


def check_losses_under_fsdp2_are_those_of_the_host(folder):
    losses, kind = on_devices("fsdp")
    assert kind == "DTensor"
    assert max(abs(a - b) for a, b in zip(losses, on_the_host(), strict=True)) < 1e-6, losses


def check_what_pytorch_asks_of_a_process_group_works_for_the_devices_tensors(folder):
    rank = Accelerator().process_index
    mine = torch.full((2,), float(rank), device=f"sim:{rank}")
    average = mine.clone()
    dist.all_reduce(average, dist.ReduceOp.AVG)
    assert average.tolist() == [1.5, 1.5]
    work = dist.all_reduce(total := mine.clone(), async_op=True)
    (result,) = work.get_future().wait()
    assert (str(result.device), total.tolist()) == (f"sim:{rank}", [6.0, 6.0])
    share = torch.empty(1, device=mine.device)
    dist.reduce_scatter(share, [mine[:1] * n for n in range(RANKS)], dist.ReduceOp.AVG)
    assert share.tolist() == [1.5 * rank]
    parts = [torch.empty(n + 1, device=mine.device) for n in range(RANKS)]
    dist.all_to_all(parts, [torch.full((rank + 1,), float(rank), device=mine.device) for _ in range(RANKS)])
    assert [part.tolist() for part in parts] == [[float(n)] * (n + 1) for n in range(RANKS)]
    following, before = (rank + 1) % RANKS, (rank - 1) % RANKS
    received = torch.empty_like(mine)
    exchange = [dist.P2POp(dist.isend, mine, following), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    assert received.tolist() == [float(before)] * 2
    pair = dist.new_group([0, 1])
    if rank < 2:
        dist.all_reduce(mine, group=pair)
        assert mine.tolist() == [1.0, 1.0]
    host = torch.tensor([rank])
    dist.all_reduce(host)
    assert host.tolist() == [6]


if __name__ == "__main__":
    run_checks(dict(globals()))
