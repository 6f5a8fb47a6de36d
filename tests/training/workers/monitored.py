"""Count hook calls, environment reads and registry look-ups during steps, and Torchport's own calls."""

import json
import os
import sys
from pathlib import Path

import pluggy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator
from torchport.plan import discovery, registry, selection

counts: dict[str, int] = {}
watching = False


def count(owner, name: str, label: str) -> None:
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        if watching:
            counts[label] = counts.get(label, 0) + 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)


count(pluggy._hooks.HookCaller, "__call__", "hook calls")
count(pluggy.PluginManager, "_hookexec", "hook calls")
for reading in ("__getitem__", "get", "__contains__", "items", "keys", "copy"):
    count(type(os.environ), reading, "environment reads")
count(os, "getenv", "environment reads")
for method in ("specs", "find", "probe", "capabilities"):
    count(registry.Installed, method, "registry look-ups")
count(registry, "load_reference", "registry look-ups")
count(discovery, "discover", "registry look-ups")
count(selection, "plan", "registry look-ups")


def main() -> None:
    global watching
    accelerator = Accelerator(gradient_accumulation_steps=2, precision="bf16")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loader = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=2)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    steps = 0
    for (inputs,) in loader:
        if steps == 2:  # PyTorch reads the environment itself when a loader and a first step start
            watching = True
        with accelerator.accumulate(model):
            loss = model(inputs).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        steps += 1
    watching = False
    assert steps == 32 // accelerator.num_processes
    watched = dict(counts)
    watching = True  # the counters count: one look-up of each kind
    os.environ.get("HOME")
    registry.Installed().specs("backend")
    discovery.discover(os.environ)
    watching = False
    control = {label: counts[label] - watched.get(label, 0) for label in counts}
    path = Path(sys.argv[1]) / f"rank{accelerator.process_index}.json"
    path.write_text(json.dumps({"steps": watched, "control": control}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
