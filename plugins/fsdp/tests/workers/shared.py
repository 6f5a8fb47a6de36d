"""The model, the data and the loop that all workers train, and hand-written counterparts."""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchport import Accelerator, PartialState
from torchport.state import AcceleratorState

WIDTH, VOCABULARY, BATCH, LR, CLIP = 10, 13, 4, 0.05, 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 17)
        self.down = nn.Linear(17, WIDTH)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """A small residual network over tokens; its widths divide by no number of processes."""

    def __init__(self, seed: int = 0, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("scale", torch.full((1,), 1.0 + seed))
        self.register_buffer("unsaved", torch.full((1,), 2.0 + seed), persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens).mean(1) * self.scale * self.unsaved
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCABULARY, (BATCH, 5), generator=generator)
    return tokens, tokens.sum(1) % 3


def optimizer_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "lr": LR / 2}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=LR, momentum=0.9)
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    tokens, labels = batch(step, rank)
    return nn.functional.cross_entropy(model(tokens).float(), labels)


def train(accelerator, model, optimizer, steps: int = 6, *, first: int = 0, clip=None) -> list[float]:
    """The loop that users write."""
    losses = []
    for step in range(first, first + steps):
        with accelerator.accumulate(model):
            loss = loss_of(model, step, accelerator.process_index)
            losses.append(loss.item())
            accelerator.backward(loss)
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def prepared(strategy, *, precision="no", accumulate=1, model=None, optimizer="adamw", **more):
    """Open a run anew and prepare a model and an optimizer that was made before."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        strategy=strategy, precision=precision, gradient_accumulation_steps=accumulate, **more
    )
    model = Network() if model is None else model
    model, optimizer = accelerator.prepare(model, optimizer_of(model, optimizer))
    return accelerator, model, optimizer


def run(strategy, steps: int = 6, clip=None, **more) -> list[float]:
    accelerator, model, optimizer = prepared(strategy, **more)
    return train(accelerator, model, optimizer, steps, clip=clip)


def by_hand(
    kind: str, steps: int = 6, accumulate: int = 1, dtype=None, scale: bool = False, clip=None, mesh=None
) -> list[float]:
    """The same in plain PyTorch, with DDP, FSDP1 or FSDP2; runs inside an open process group."""
    model, rank = Network(), dist.get_rank()
    autocast = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp1":
        optimizer = optimizer_of(model)  # before its parameters are views of flat ones
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        if dtype:
            options["mixed_precision"] = MixedPrecision(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True
            )
        for index, block in enumerate(model.blocks):
            model.blocks[index] = FullyShardedDataParallel(block, **options)
        model = FullyShardedDataParallel(model, **options)
    else:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = optimizer if kind == "fsdp1" else optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scale)
    losses = []
    for start in range(0, steps, accumulate):
        window = range(start, min(start + accumulate, steps))
        for step in window:
            last = step == window[-1]
            if kind == "fsdp2":
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or kind == "fsdp2" else model.no_sync():
                with autocast:
                    tokens, labels = batch(step, rank)
                    outputs = model(tokens)
                loss = nn.functional.cross_entropy(outputs.float(), labels)
                losses.append(loss.item())
                scaler.scale(loss / len(window)).backward()
        scaler.unscale_(optimizer)
        if clip is not None and kind == "fsdp1":
            model.clip_grad_norm_(clip)
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def whole(accelerator, model) -> dict[str, list]:
    """The whole parameters, on rank 0."""
    return {name: value.tolist() for name, value in accelerator.get_state_dict(model).items()}


def report(results: dict) -> None:
    """Write results for the test."""
    state = PartialState()
    out = Path(sys.argv[1])
    (out / f"rank{state.process_index}.json").write_text(json.dumps(results))
