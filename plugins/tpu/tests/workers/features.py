"""What one process of torch_xla can do beside training; written as JSON."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchport import Accelerator
from torchport.plan.discovery import discover
from torchport.plan.registry import load_reference
from torchport.plugin import Topology

FOLDER = Path(sys.argv[1])


def collectives(device: torch.device) -> dict:
    spec = discover(os.environ).find("collectives", "xla", "a test").spec
    group = load_reference(spec.factory)(spec)
    store = group.rendezvous(Topology(), timedelta(seconds=30))
    group.open(Topology(), device, timedelta(seconds=30), store)
    try:
        values = torch.tensor([1.0, 2.0], device=device)
        found = {
            "all_reduce": group.all_reduce(values.clone()).cpu().tolist(),
            "all_gather": group.all_gather(values[None]).cpu().tolist(),
            "reduce_scatter": group.reduce_scatter(values.clone()).cpu().tolist(),
            "broadcast": group.broadcast(values.clone()).cpu().tolist(),
            "scatter": group.scatter(values.clone(), [torch.tensor([3.0, 4.0], device=device)])
            .cpu()
            .tolist(),
            "objects": group.all_gather_object({"rank": 0}),
            "host": group.all_reduce(torch.tensor([5.0])).tolist(),
        }
        group.barrier()
        return found
    finally:
        group.close()
        assert not dist.is_initialized()


def main() -> None:
    accelerator = Accelerator()
    device = accelerator.device
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {
        "place": [os.environ[name] for name in names],
        "runtime_rank": os.environ["PJRT_LOCAL_PROCESS_RANK"],
    }
    for name in ("float32", "float64"):
        held = torch.tensor([1.001], dtype=getattr(torch, name), device=device) * 1
        found[name] = [held.cpu().item(), str(held.dtype)]
    found["collectives"] = collectives(device)
    torch.manual_seed(0)
    model = accelerator.prepare(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    )
    inputs = torch.ones(3, 4, device=device)
    found["eager"] = model(inputs).detach().cpu().flatten().tolist()
    compiled = torch.compile(model, backend=accelerator.backend.compile_backend())
    with torch.no_grad():
        found["compiled"] = compiled(inputs).cpu().flatten().tolist()
    found["eager_weights"] = model[0].weight.detach().cpu().tolist()
    accelerator.save_state(FOLDER / "background", blocking=False)
    accelerator.wait_for_checkpoint()
    from safetensors.torch import load_file

    found["background"] = load_file(FOLDER / "background" / "model.safetensors")["0.weight"].tolist()
    (FOLDER / "result.json").write_text(json.dumps(found))
    accelerator.end_training()


main()
