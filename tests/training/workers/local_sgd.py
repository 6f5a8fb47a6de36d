"""Local SGD beside the same thing written by hand: what differs, and what leaves the machine meanwhile."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, LocalSGD

EVERY = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def by_hand(accelerator: Accelerator, batches: list, accumulate: int) -> nn.Module:
    """Train a replica for itself, and average the parameters every so many steps and at the end."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def average() -> None:
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= accelerator.num_processes
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    steps = 0
    for index, (inputs, targets) in enumerate(batches):
        (nn.functional.mse_loss(model(inputs), targets) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % EVERY == 0:
                average()
    average()
    return model


def with_local_sgd(accelerator: Accelerator, batches: list, enabled: bool = True) -> tuple[nn.Module, list]:
    """Train with `LocalSGD`; return the model and, for each optimizer step, whether all replicas were equal after it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    equal = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=EVERY, enabled=enabled) as local_sgd:
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
            if accelerator.sync_gradients:
                equal.append(is_same_everywhere(accelerator, model))
    return accelerator.unwrap_model(model), equal


def is_same_everywhere(accelerator: Accelerator, model: nn.Module) -> bool:
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return bool((accelerator.gather(flat.unsqueeze(0)) == flat).all())


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def refused(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def compare(accelerator: Accelerator, accumulate: int) -> dict:
    """Train both ways, each optimizer step over so many micro-batches."""
    accelerator.gradient_accumulation_steps = accumulate
    torch.manual_seed(1)
    inputs, targets = torch.randn(64 * accumulate, 4), torch.randn(64 * accumulate, 2)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    batches = [(x.clone(), y.clone()) for x, y in accelerator.prepare(loader)]
    expected = by_hand(accelerator, batches, accumulate)
    model, equal = with_local_sgd(accelerator, batches)
    plain, always_equal = with_local_sgd(accelerator, batches, enabled=False)
    return {
        "difference": difference(model, expected),
        "difference from synchronous training": difference(model, plain),
        "equal after step": equal,
        "equal after step, disabled": always_equal,
        "equal at the end": is_same_everywhere(accelerator, model),
    }


def main() -> None:
    accelerator = Accelerator()
    found = {"trained": [compare(accelerator, accumulate) for accumulate in (1, 2)]}

    prepared = accelerator.prepare(network())
    strategy = accelerator._contents.strategy
    found |= {
        "not prepared": refused(lambda: LocalSGD(accelerator, network(), EVERY)),
        "no steps": refused(lambda: LocalSGD(accelerator, prepared, 0)),
    }
    type(strategy).supports_local_steps = False
    found["strategy"] = refused(lambda: LocalSGD(accelerator, prepared, EVERY))
    found["strategy, disabled"] = refused(lambda: LocalSGD(accelerator, prepared, None, enabled=False))
    type(strategy).supports_local_steps = True

    try:  # one process fails inside: the other must not wait for it at the end of the block
        with LocalSGD(accelerator, prepared, EVERY):
            if accelerator.process_index == 1:
                raise ZeroDivisionError
            raise KeyError
    except (ZeroDivisionError, KeyError) as error:
        found["raised"] = type(error).__name__
    found["gradients are exchanged again"] = prepared.require_backward_grad_sync
    Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


main()
