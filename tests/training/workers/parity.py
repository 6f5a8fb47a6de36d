"""Train the same model by hand and with Torchport, and write both series of losses; run in 1 or 2 processes.

Every case trains a small network on fixed data. `hand` is plain PyTorch: `DistributedDataParallel`, autocast,
`GradScaler` and accumulation spelled out. `torchport` is the loop that users write.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, PartialState
from torchport.state import AcceleratorState

BATCH, EPOCHS, LR = 4, 3, 0.05


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def by_hand(
    samples: int, accumulate: int, dtype: torch.dtype | None, scale: bool, clip: float | None
) -> list[float]:
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    model = network()
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5 * world, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=scale)
    batches = list(DataLoader(data(samples), batch_size=BATCH))[rank::world]
    losses = []
    for _ in range(EPOCHS):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            for index, (inputs, labels) in enumerate(window):
                last = index == len(window) - 1
                with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                    with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                        outputs = model(inputs)
                    loss = nn.functional.cross_entropy(outputs.float(), labels)
                    losses.append(loss.item())
                    loss = loss / len(window) if len(window) > 1 else loss
                    scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            for _ in range(world):
                scheduler.step()
            optimizer.zero_grad()
    return losses


def with_torchport(samples: int, accumulate: int, precision: str, clip: float | None) -> list[float]:
    accelerator = Accelerator(precision=precision, gradient_accumulation_steps=accumulate)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5 * accelerator.num_processes, gamma=0.5)
    loader = DataLoader(data(samples), batch_size=BATCH)
    scheduler, loader, model, optimizer = accelerator.prepare(scheduler, loader, model, optimizer)
    losses = []
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                losses.append(loss.item())
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return losses


CASES = {
    "fp32": (56, 1, "no", None, False, None),
    "accumulate 3, odd remainder": (56, 3, "no", None, False, None),
    "accumulate 3, clipped": (56, 3, "no", None, False, 0.1),
    "bf16": (56, 1, "bf16", torch.bfloat16, False, None),
    "bf16, accumulate 3": (56, 3, "bf16", torch.bfloat16, False, None),
    "fp16": (56, 1, "fp16", torch.float16, True, None),
    "fp16, accumulate 3, clipped": (56, 3, "fp16", torch.float16, True, 0.1),
}


def items_weigh_the_same() -> dict[str, list[float]]:
    """Train on sequences of uneven lengths, over processes and micro-batches and in one big batch."""
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    generator = torch.Generator().manual_seed(3)
    lengths = [[5, 1, 9], [2, 7, 4]]
    sequences = [[torch.randn(n, 6, generator=generator) for n in row] for row in lengths]
    targets = [[torch.randint(0, 3, (n,), generator=generator) for n in row] for row in lengths]

    big = network()
    everything = torch.cat([s for row in sequences[:world] for s in row])
    truth = torch.cat([t for row in targets[:world] for t in row])
    nn.functional.cross_entropy(big(everything), truth).backward()
    expected = torch.cat([p.grad.flatten() for p in big.parameters()]).tolist()

    results = {"expected": expected}
    for reduction in ("mean", "sum"):
        AcceleratorState._reset_state()
        accelerator = Accelerator(gradient_accumulation_steps=3)
        model = accelerator.prepare(network())
        for sequence, target in zip(sequences[rank], targets[rank], strict=True):
            with accelerator.accumulate(model, num_items=len(target), reduction=reduction):
                loss = nn.functional.cross_entropy(model(sequence), target, reduction=reduction)
                accelerator.backward(loss)
        results[reduction] = torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()
    return results


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    results = {}
    for name in names:
        samples, accumulate, precision, dtype, scale, clip = CASES[name]
        AcceleratorState._reset_state()
        mine = with_torchport(samples, accumulate, precision, clip)
        hand = by_hand(samples, accumulate, dtype, scale, clip)
        results[name] = {"torchport": mine, "hand": hand}
    results["items"] = items_weigh_the_same()
    state = PartialState()
    results["processes"] = state.num_processes
    results["plan"] = {d.slot: d.name for d in state.plan.decisions}
    (out / f"rank{state.process_index}.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
