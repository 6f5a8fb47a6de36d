"""What a process holds in memory: the bytes of its tensors, and its peak while a model is made and sharded."""

import gc
import sys

import torch
from shared import report
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchport import Accelerator, PartialState
from torchport.state import AcceleratorState
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp

WIDTH, LAYERS = 256, 6
WIDE, DEEP = 1024, 32  # 4 MiB for each layer: the system gets the memory back when it is given up


class Layers(nn.Module):
    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def step(model, optimizer, backward) -> None:
    for _ in range(2):
        backward(model(torch.ones(4, WIDTH)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def held(*roots) -> int:
    """The bytes of all storages that are alive in this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                local = thing._local_tensor if hasattr(thing, "_local_tensor") else thing
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError, ReferenceError):
            continue
    storages.pop(0, None)
    return sum(storages.values())


def by_hand() -> dict:
    model = Layers()
    mesh = init_device_mesh("cpu", (PartialState().num_processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    prepared = held()
    step(model, optimizer, torch.Tensor.backward)
    return {"prepared": prepared, "trained": held()}


def with_torchport() -> dict:
    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy=Fsdp(transformer_cls_names_to_wrap=["Linear"]))
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    prepared = held()
    step(model, optimizer, accelerator.backward)
    return {"prepared": prepared, "trained": held()}


def loading(efficient: bool) -> float:
    """The peak of the process while a model is made and sharded, above what it held before, in model sizes."""
    AcceleratorState._reset_state()
    settings = Fsdp(transformer_cls_names_to_wrap=["Linear"], cpu_ram_efficient_loading=efficient)
    accelerator = Accelerator(strategy=settings)
    gc.collect()
    backend, device = accelerator.backend, accelerator.device
    backend.reset_peak_memory(device)
    before = backend.max_memory_allocated(device)
    with accelerator.model_init_context():
        model = Layers(WIDE, DEEP)
    accelerator.prepare(model)
    return (backend.max_memory_allocated(device) - before) / (4 * DEEP * WIDE * WIDE)


def main() -> None:
    PartialState()
    results = {"whole": 4 * LAYERS * WIDTH * WIDTH}
    results["torchport"] = with_torchport()
    AcceleratorState._reset_state()
    gc.collect()
    PartialState()
    results["hand"] = by_hand()
    gc.collect()
    results["one loads"], results["all load"] = loading(True), loading(False)
    report(results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    assert len(sys.argv) > 1
    main()
