"""Train with the backend and strategy of the environment, and by hand on the CPU; write what both gave as JSON."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch_xla
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchport import Accelerator

FOLDER = Path(sys.argv[1])
EPOCHS, BATCH, SAMPLES, STEPS = 2, 4, 22, 2


class Pair(NamedTuple):
    """A batch whose type must survive the way to the device."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Pairs(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Pair:
        return Pair(INPUTS[index], TARGETS[index])


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(INPUTS, TARGETS, strict=True)


class Broken(Pairs):
    def __getitem__(self, index: int) -> Pair:
        if index == 13:
            raise ValueError("sample 13 cannot be read")
        return super().__getitem__(index)


torch.manual_seed(7)
INPUTS, TARGETS = torch.randn(SAMPLES, 6), torch.randn(SAMPLES, 6)


class Tied(nn.Module):
    """Two layers around one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 8, bias=False), nn.Linear(8, 6)
        self.back = nn.Linear(6, 8, bias=False)
        self.back.weight = self.encode.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.decode(self.back(self.decode(self.encode(inputs).relu())).relu())


def by_hand(model: nn.Module, batches: list) -> list[float]:
    """Two micro-batches a step, the last window of an epoch shorter where their number is odd."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(EPOCHS):
        for number, (inputs, targets) in enumerate(batches):
            last = number == len(batches) - 1
            size = 1 if last and number % STEPS == 0 else STEPS
            loss = nn.functional.mse_loss(model(inputs), targets)
            (loss / size).backward()
            losses.append(loss.item())
            if number % STEPS == STEPS - 1 or last:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return losses


def train(model: nn.Module, dataset, folder: Path | None = None) -> dict:
    strategy = os.environ.get("STRATEGY") or None
    accelerator = Accelerator(strategy=strategy, gradient_accumulation_steps=STEPS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.05
    )  # before prepare: it must follow the parameters
    loader = DataLoader(dataset, batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, kinds, ahead = [], set(), []
    for _ in range(EPOCHS):
        for batch in loader:
            kinds.add(type(batch).__name__)
            ahead.append(loader.end_of_dataloader)
            inputs, targets = batch
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    if folder is not None:
        accelerator.save_state(folder)
    found = {
        "losses": losses,
        "kinds": sorted(kinds),
        "ends": [number for number, end in enumerate(ahead) if end],
        "device": str(inputs.device),
        "read_ahead": loader.prefetch.__qualname__.partition(".<locals>")[0],
        "plan": [
            accelerator.plan.backend,
            accelerator.plan.strategy,
            str(accelerator.distributed_type.value),
        ],
        "shardings": shardings(model, inputs, optimizer),
        "weights": {name: value.cpu().flatten().tolist() for name, value in model.state_dict().items()},
    }
    accelerator.end_training()
    return found


def shardings(model: nn.Module, inputs: torch.Tensor, optimizer) -> dict:
    spec = torch_xla._XLAC._get_xla_sharding_spec
    first = next(model.parameters())
    return {
        "inputs": spec(inputs),
        "parameters": {name: spec(parameter) for name, parameter in model.named_parameters()},
        "state": spec(optimizer.state[first]["exp_avg"]),
    }


def main() -> None:
    torch.manual_seed(0)
    model = Tied()
    found = {"pairs": train(copy.deepcopy(model), Pairs(), FOLDER / "checkpoint")}
    # Behind the first use of the device: autograd counts the devices at the first backward, on whichever it is.
    found["hand"] = by_hand(model, list(zip(INPUTS.split(BATCH), TARGETS.split(BATCH), strict=True)))
    tied = copy.deepcopy(model)
    found["stream"] = train(tied, Stream())
    found["tied"] = tied.encode.weight is tied.back.weight
    try:
        train(copy.deepcopy(model), Broken())
    except ValueError as error:
        found["error"] = str(error)
    (FOLDER / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
