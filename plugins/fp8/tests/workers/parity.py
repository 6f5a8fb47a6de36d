"""Train the same model with torchao by hand and with Torchport, and write both; run in 1 or 2 processes."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, PartialState
from torchport.state import AcceleratorState
from torchport_fp8 import AORecipeKwargs

# recipe, accumulation, settings of AORecipeKwargs, names of the layers that are converted by hand
CASES = {
    "tensorwise": ("tensorwise", 1, {}, {"2", "4"}),
    "rowwise, accumulate 3": ("rowwise", 3, {"recipe": "rowwise"}, {"2", "4"}),
    "weight gradients in high precision": (
        "rowwise_with_gw_hp", 1, {"recipe": "rowwise_with_gw_hp"}, {"2", "4"},
    ),
    "first and last too, one name left out": (
        "tensorwise", 1, {"skip_first_last": False, "skip_modules": ("2",)}, {"0", "4"},
    ),
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.ReLU(),
        nn.Linear(32, 48),
        nn.ReLU(),
        nn.Linear(48, 32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(128, 16, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())


def cast(layer, inputs):
    """What torchao does to inputs by itself under autocast on CUDA."""
    return inputs[0].to(torch.bfloat16)


def by_hand(recipe: str, accumulate: int, names: set[str]) -> list[float]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    state = PartialState()
    rank, world = state.process_index, state.num_processes
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in names)
    if recipe == "rowwise_with_gw_hp":
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(cast)
    if world > 1:
        model = DistributedDataParallel(model)
    batches, losses = list(DataLoader(data(), batch_size=16))[rank::world], []
    for _ in range(2):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            for index, (inputs, labels) in enumerate(window):
                last = index == len(window) - 1
                with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                    with torch.autocast("cpu", torch.bfloat16):
                        outputs = model(inputs)
                    loss = nn.functional.cross_entropy(outputs.float(), labels)
                    losses.append(loss.item())
                    (loss / len(window) if len(window) > 1 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def with_torchport(accumulate: int, settings: dict) -> list[float]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="fp8",
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[AORecipeKwargs(emulate=True, **settings)],
    )
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=16))
    losses = []
    for _ in range(2):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return losses


def resume(folder: Path) -> dict[str, list[float]]:
    """Train on, uninterrupted and from a checkpoint, and return both series of losses."""

    def start():
        AcceleratorState._reset_state()
        accelerator = Accelerator(precision=AORecipeKwargs(emulate=True))
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return accelerator, *accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=16))

    def train(accelerator, model, optimizer, loader):
        losses = []
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    first = start()
    train(*first)
    first[0].save_state(str(folder / "checkpoint"))
    uninterrupted = train(*first)
    second = start()
    second[0].load_state(str(folder / "checkpoint"))
    resumed = train(*second)
    return {"uninterrupted": uninterrupted, "resumed": resumed}


def sharded_by_hand() -> list[float]:
    """Train with FSDP2 that gathers weights in 8 bits, all written out."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = network()
    config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in {"2", "4"})
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state, losses = PartialState(), []
    for inputs, labels in list(DataLoader(data(), batch_size=16))[state.process_index :: state.num_processes]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(precompute: bool) -> dict:
    """Train with FSDP2 that gathers weights in 8 bits; the optimizer is made before."""
    AcceleratorState._reset_state()
    recipe = AORecipeKwargs(
        emulate=True,
        enable_fsdp_float8_all_gather=True,
        precompute_float8_dynamic_scale_for_fsdp=precompute,
    )
    accelerator = Accelerator(strategy="fsdp", precision="fp8", kwargs_handlers=[recipe])
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=16))
    losses = []
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    weight = model.get_submodule("2").weight
    whole = accelerator.get_state_dict(model)
    return {
        "losses": losses,
        "kind": type(weight.to_local()).__name__,
        "scale": weight._local_tensor._precomputed_scale is not None,
        "names": list(whole),
        "kinds": sorted({type(value).__name__ for value in whole.values()}),
    }


def results(folder: Path) -> dict:
    torch.set_num_threads(1)
    found = {}
    for name, (recipe, accumulate, settings, names) in CASES.items():
        mine = with_torchport(accumulate, settings)
        found[name] = {"torchport": mine, "hand": by_hand(recipe, accumulate, names)}
    found["resume"] = resume(folder)
    state = PartialState()
    if state.num_processes > 1:
        found["sharded"] = {"": sharded(False), "precomputed": sharded(True), "hand": sharded_by_hand()}
    found["processes"], found["rank"] = state.num_processes, state.process_index
    found["precision"] = state.plan.precision
    AcceleratorState._reset_state()
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = results(out)
    (out / f"rank{found['rank']}.json").write_text(json.dumps(found))
