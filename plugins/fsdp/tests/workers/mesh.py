"""Training over meshes of four processes, beside one process that has every batch as a whole."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mesh_model import (
    BATCH,
    PLAN,
    Transformer,
    loss_of,
    optimizer_of,
    padded,
    plain,
    prepared,
    rows,
    run,
    train,
)
from shared import report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchport import Accelerator, PartialState, TorchportError
from torchport.state import AcceleratorState
from torchport.utils import ParallelismConfig as Mesh
from torchport.utils import TorchContextParallelConfig, TorchTensorParallelConfig
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp

MLP = {name: style for name, style in PLAN.items() if name.endswith(("up", "down"))}
BLOCKS = {"transformer_cls_names_to_wrap": ["Block"]}
TP = TorchTensorParallelConfig(plan=PLAN)
RING = TorchContextParallelConfig(cp_comm_strategy="alltoall")
MESHES = {
    "replicate 2 x shard 2": {"dp_replicate_size": 2, "dp_shard_size": 2},
    "tp 4": {"tp_size": 4, "tp_handler": TP},
    "shard 2 x tp 2": {"dp_shard_size": 2, "tp_size": 2, "tp_handler": TP},
    "shard 2 x cp 2": {"dp_shard_size": 2, "cp_size": 2},
    "cp 4, ring": {"cp_size": 4, "cp_handler": RING},
    "shard 2 x sp 2": {"dp_shard_size": 2, "sp_size": 2},
    "sp 2 x tp 2": {"sp_size": 2, "tp_size": 2, "tp_handler": TP},
    "replicate 2 x cp 2, ring": {"dp_replicate_size": 2, "cp_size": 2, "cp_handler": RING},
}
LOOPED = [*MESHES][:6]
"""The others train other models, in `variants`."""

CHECKPOINTS = {
    "shard 2 x tp 2": ("SHARDED_STATE_DICT", "shard 2 x tp 2"),
    "shard 2 x cp 2, full": ("FULL_STATE_DICT", "shard 2 x cp 2"),
}


def variants() -> dict:
    """Other models, precisions, data and settings."""
    cases = {
        "grouped heads, ring": ("replicate 2 x cp 2, ring", {"model": Transformer(key_heads=2)}),
        "one key head, sp": ("sp 2 x tp 2", {"model": Transformer(key_heads=1), "plan": MLP}),
        "not causal, gathered": ("shard 2 x cp 2", {"model": Transformer(causal=False)}),
        "odd pieces, ring": ("cp 4, ring", {"data": rows(2, 12)}),
        "grouped heads, gathered": (
            "shard 2 x cp 2",
            {"model": Transformer(key_heads=2), "strategy": Fsdp(activation_checkpointing=True, **BLOCKS)},
        ),
    }
    results = {}
    for name, (mesh, more) in cases.items():
        shown = {key: more[key] for key in ("model", "data") if key in more}
        sizes = MESHES[mesh]
        if "plan" in more:
            sizes = sizes | {"tp_handler": TorchTensorParallelConfig(plan=more.pop("plan"))}
        results[name] = [plain(**shown, steps=2)["losses"], run(Mesh(**sizes), steps=2, **more)["losses"]]
    for mesh in ("shard 2 x cp 2", "shard 2 x sp 2"):
        results[f"backward outside, {mesh}"] = [
            plain(steps=2)["losses"],
            backward_outside(Mesh(**MESHES[mesh])),
        ]
    half = {"dtype": torch.bfloat16, "steps": 2}
    for mesh in ("shard 2 x tp 2", "shard 2 x cp 2"):
        got = run(Mesh(**MESHES[mesh]), precision="bf16", steps=2)
        results[f"bf16, {mesh}"] = [plain(**half)["losses"], got["losses"]]
    return results


class Checkpointed(torch.nn.Module):
    """A block whose activations the script itself has computed anew."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def backward_outside(mesh: Mesh) -> list[float]:
    """Activations are computed anew after the block in which they were computed first."""
    model, losses = Transformer(), []
    model.blocks[0] = Checkpointed(model.blocks[0])
    accelerator, model, optimizer, loader = prepared(mesh, model=model, steps=2)
    for batch in loader:
        with accelerator.maybe_context_parallel(
            buffers=batch, buffer_seq_dims=[1] * 3, no_restore_buffers=set(batch)
        ):
            loss = loss_of(model, *batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    heads = torch.ones(1, 4, 4, 4)
    assert F.scaled_dot_product_attention(heads, heads, heads).shape == heads.shape
    return losses


def by_token() -> dict:
    """Norms of gradients where tokens weigh alike, however many each process has."""
    found = {"plain": plain(data=padded(4), accumulate=3, clip=0.5, by_token=True)["norms"]}
    for mesh in ("shard 2 x cp 2",):
        found[mesh] = run(Mesh(**MESHES[mesh]), data=padded(4), accumulate=3, clip=0.5, by_token=True)[
            "norms"
        ]
    return found


def by_hand() -> dict:
    """The losses of this process over a mesh of 2 by 2, by Torchport and by PyTorch alone."""
    accelerator, model, optimizer, loader = prepared(Mesh(**MESHES["shard 2 x tp 2"]), steps=5)
    own, batches = [], []
    for tokens, targets, places in loader:
        batches.append((tokens, targets, places))
        loss = loss_of(model, tokens, targets, places)
        own.append(loss.item())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Transformer()
    styles = {
        name: {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}[kind] for name, kind in PLAN.items()
    }
    plan = {name.replace("*", str(i)): kind() for name, kind in styles.items() for i in range(1)}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    optimizer, hand = optimizer_of(model), []
    for batch in batches:
        loss = loss_of(model, *batch)
        hand.append(loss.item())
        loss.backward()
        norms = [p.grad.norm().full_tensor() for p in model.parameters()]
        total = torch.stack(norms).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(torch.clamp(0.5 / (total + 1e-6), max=1.0))
        optimizer.step()
        optimizer.zero_grad()
    return {"own": own, "hand": hand}


def checkpoints(folder: Path) -> dict:
    """Two steps, a checkpoint, two more; then each is loaded over other meshes, and goes on."""
    results, data = {}, rows(4)
    first = torch.utils.data.Subset(data, range(2 * BATCH))
    last = torch.utils.data.Subset(data, range(2 * BATCH, 4 * BATCH))
    for name, (kind, mesh) in CHECKPOINTS.items():
        parts = prepared(Mesh(**MESHES[mesh]), strategy=Fsdp(state_dict_type=kind), data=first)
        train(*parts)
        accelerator, model, optimizer, _ = parts
        accelerator.save_state(str(folder / name))
        loader = accelerator.prepare(torch.utils.data.DataLoader(last, batch_size=BATCH))
        results[name] = train(accelerator, model, optimizer, loader)["losses"]
    targets = [
        ("shard 2 x tp 2", "shard 2 x tp 2"), ("shard 2 x tp 2", "shard 2 x sp 2"), ("shard 2 x tp 2", "ddp"),
        ("shard 2 x cp 2, full", "shard 2 x tp 2"),
    ]  # fmt: skip
    for source, target in targets:
        mesh = None if target == "ddp" else Mesh(**MESHES[target])
        strategy = "ddp" if mesh is None else Fsdp()
        parts = prepared(mesh, strategy=strategy, model=Transformer(seed=5), data=last)
        parts[0].load_state(str(folder / source))
        results[f"{source} -> {target}"] = train(*parts)["losses"]
    return results


def features() -> dict:
    """What else a mesh means to a script."""
    results = {}
    mesh = Mesh(dp_shard_size=2, tp_size=2)
    torch.manual_seed(PartialState().process_index)
    accelerator, model, *_ = prepared(mesh, model=Transformer(tp_plan=PLAN))
    drawn = torch.rand(1).item()
    data = torch.arange(10)
    shuffled = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    read = [batch.tolist() for batch in shuffled]
    gathered = [accelerator.gather_for_metrics(batch).tolist() for batch in shuffled]
    objects = [accelerator.gather_for_metrics(b.tolist(), use_gather_object=True) for b in shuffled]
    whole = Transformer().state_dict()
    with accelerator.full_parameters(model, writeback=True):
        same = all(torch.equal(value, whole[name]) for name, value in model.named_parameters())
        with torch.no_grad():
            model.blocks[0].up.weight.fill_(0.5)
    state = accelerator.get_state_dict(model)
    results["mesh"] = {
        "drawn": drawn, "read": read, "gathered": gathered, "objects": objects, "whole": same,
        "written": float(state["blocks.0.up.weight"].sum()) if state else None,
        "local": list(model.blocks[0].query.weight.to_local().shape),
        "names": list(accelerator.torch_device_mesh.mesh_dim_names),
        "ranks": [accelerator.data_parallel_rank, accelerator.data_parallel_shard_rank,
                  accelerator.tensor_parallel_rank, accelerator.context_parallel_rank],
    }  # fmt: skip
    accelerator, *_ = prepared(Mesh(dp_replicate_size=4), strategy="ddp")
    results["ddp"] = {
        "names": list(accelerator.torch_device_mesh.mesh_dim_names), "size": accelerator.torch_device_mesh.size(),
        "rank": accelerator.data_parallel_replicate_rank, "readers": accelerator.batch_readers,
    }  # fmt: skip
    accelerator, model, _, loader = prepared(Mesh(**MESHES["shard 2 x cp 2"]))
    tokens, targets, places = next(iter(loader))
    before = tokens.clone()
    buffers = [tokens, targets, places]
    with accelerator.maybe_context_parallel(
        buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers={targets}
    ):
        model(tokens, places)
        positions = places[0].tolist()
    results["buffers"] = {
        "positions": positions, "restored": torch.equal(tokens, before), "kept": list(targets.shape),
        "names": list(accelerator.torch_device_mesh.mesh_dim_names),
        "patched": F.scaled_dot_product_attention.__name__,
    }  # fmt: skip
    return results


class Tied(Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Eager(torch.nn.Linear):
    def forward(self, tokens, places):
        return super().forward(F.one_hot(tokens, 29).float())


def refusals() -> dict:
    """What is refused, by the sentence that says so."""
    found = {}

    def refused(name, mesh, **more):
        try:
            run(mesh, steps=1, **more)
            found[name] = "nothing was refused"
        except TorchportError as error:
            found[name] = str(error)

    def tp(plan):
        return Mesh(dp_shard_size=2, tp_size=2, tp_plan=plan)

    rank = PartialState().process_index
    refused("no plan", tp(None))
    refused("no such module", tp({"layers.*.query": "colwise"}))
    refused("no such style", tp({"blocks.*.query": "diagonal"}))
    refused("tied", tp({"embed": "rowwise"}), model=Tied())
    refused("cut heads", Mesh(tp_size=4, tp_plan={"head": "colwise"}))
    refused("length", Mesh(cp_size=4), data=rows(1, 10))
    refused("heads", Mesh(sp_size=4), model=Transformer(key_heads=1, heads=2))
    refused("eager", Mesh(cp_size=4), model=Eager(29, 29))
    refused("ranks", tp(PLAN | {"head": "colwise"} if rank == 3 else PLAN))
    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy="fsdp", parallelism_config=Mesh(cp_size=4))
    heads = torch.zeros(1, 4, 4, 4)
    for name, call in {
        "mask": lambda: F.scaled_dot_product_attention(heads, heads, heads, attn_mask=torch.ones(4, 16)),
        "nested": lambda: accelerator.maybe_context_parallel().__enter__(),
    }.items():
        try:
            with accelerator.maybe_context_parallel():
                call()
        except TorchportError as error:
            found[name] = str(error)
    found["patched"] = F.scaled_dot_product_attention.__name__
    return found


def meshes() -> dict:
    """The losses and norms over every mesh, and of plain PyTorch."""
    loop = {"accumulate": 3, "clip": 0.5, "steps": 4}
    return {"plain": plain(**loop)} | {name: run(Mesh(**MESHES[name]), **loop) for name in LOOPED}


def main() -> None:
    PartialState()
    folder = Path(sys.argv[1])
    parts = {
        "meshes": meshes,
        "variants": variants,
        "by token": by_token,
        "by hand": by_hand,
        "checkpoints": lambda: checkpoints(folder),
        "features": features,
        "refusals": refusals,
    }
    results = {}
    for name in sys.argv[2:] or parts:
        results[name] = parts[name]()
    report(results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
