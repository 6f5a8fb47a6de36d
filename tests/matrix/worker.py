"""Run cells of the matrix one after another in the processes of one job: `worker.py FOLDER CELLS`, which is JSON.

Each process appends two lines for a cell to `FOLDER/rankN.jsonl`: one before it, and its result.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from cells import BATCH, LENGTH, WINDOWS, Cell
from torch import nn
from torch.distributed.tensor import DTensor
from torchport import Accelerator
from torchport.errors import TorchportError
from torchport.state import AcceleratorState

WIDTH, HEADS, VOCABULARY, CLIP = 32, 4, 16, 1.5
LIMIT = float(os.environ.get("MATRIX_LIMIT", "60"))
"""Seconds for one cell: then every process prints its stacks, and ends."""


class Block(nn.Module):
    """Causal attention and a perceptron, as in GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        normed = self.norm1(x)
        heads = (
            layer(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    """Two blocks between an embedding and a head; all sizes are multiples of 16, as fp8 needs them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return tokens, (3 * tokens + 1) % VOCABULARY


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    return loss_on(model, *batch(number))


def loss_on(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def number_of(window: int, micro: int, accumulation: int, share: int, shares: int) -> int:
    """Return which batch one share of the data reads: no two ever read the same."""
    return (window * accumulation + micro) * shares + share


@functools.cache
def reference(accumulation: int, shares: int) -> list[list[float]]:
    """Train in plain PyTorch, in float32, in one process, on the micro-batches of all shares.

    Returns:
        For each share, the losses of its micro-batches, and that of a further batch after the last step.
    """
    model = Network()
    optimizer = optimizer_of(model)
    losses, norms = [[] for _ in range(shares)], []
    for window in range(WINDOWS):
        for micro in range(accumulation):
            for share in range(shares):
                loss = loss_of(model, number_of(window, micro, accumulation, share, shares))
                (loss / (accumulation * shares)).backward()
                losses[share].append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) < CLIP < max(norms), "gradients must be clipped in some steps and not in others"
    with torch.no_grad():
        last = loss_of(model, -1).item()
    assert last < losses[0][0] / 5, "the reference learns nothing, so that it proves nothing"
    return [[*own, last] for own in losses]


def start(cell: Cell, model: nn.Module | None = None) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """Begin a run anew in this process, and prepare a model and its optimizer."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        strategy=strategy_of(cell),
        precision=precision_of(cell),
        gradient_accumulation_steps=cell.accumulation,
        **({"parallelism_config": mesh_of(cell)} if cell.dimension else {}),
    )
    model = Network() if model is None else model
    return accelerator, *accelerator.prepare(model, optimizer_of(model))


def train(accelerator, model, optimizer, cell: Cell, windows: range) -> list[float]:
    """Train for some windows, and return the losses of this process and, after them, that of a further batch.

    Where processes share a batch, the losses are the means over all processes.
    """
    share = accelerator.data_parallel_rank if cell.dimension else accelerator.process_index
    losses = []
    for window in windows:
        for micro in range(cell.accumulation):
            tokens, labels = batch(number_of(window, micro, cell.accumulation, share, cell.shares))
            with sequences(accelerator, cell, tokens, labels), accelerator.accumulate(model):
                loss = loss_on(model, tokens, labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            known = loss.detach()
            losses.append((accelerator.reduce(known, "mean") if cell.dimension else known).item())
    with torch.no_grad():
        return [*losses, loss_of(model, -1).item()]


def sequences(accelerator, cell: Cell, *buffers: torch.Tensor) -> AbstractContextManager:
    """Return a context in which each process has its part of the sequences."""
    if cell.dimension not in ("cp", "sp"):
        return nullcontext()
    return accelerator.maybe_context_parallel(
        buffers=list(buffers), buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    )


def expected_of(cell: Cell, rank: int) -> list[float]:
    """Return what `train` must return."""
    shares = reference(cell.accumulation, cell.shares)
    return [sum(each) / len(each) for each in zip(*shares, strict=True)] if cell.dimension else shares[rank]


def run(cell: Cell) -> dict:
    """Train one cell, and look at what trains."""
    accelerator, model, optimizer = start(cell)
    plain, seen = accelerator.unwrap_model(model), look(accelerator, model)

    def watch(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen["dtype"] = sorted({*seen.get("dtype", ()), str(output.dtype).removeprefix("torch.")})
        seen["tokens"] = sorted({*seen.get("tokens", ()), args[0].shape[1]})

    def watch_head(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen["resharded"] = isinstance(plain.blocks[0].up.weight, DTensor)

    plain.blocks[1].up.register_forward_hook(watch)
    plain.head.register_forward_hook(watch_head)
    losses = train(accelerator, model, optimizer, cell, range(WINDOWS))
    return {"losses": losses, "reference": expected_of(cell, accelerator.process_index), "seen": seen}


def precision_of(cell: Cell):
    if cell.precision != "fp8":
        return cell.precision
    from torchport_fp8 import AORecipeKwargs

    return AORecipeKwargs(emulate=True)


def strategy_of(cell: Cell):
    way = cell.layout.partition(" ")[2]
    if cell.strategy == "deepspeed":
        from torchport_deepspeed import DeepSpeedPlugin

        return DeepSpeedPlugin(zero_stage=int(way))
    if cell.strategy in ("fsdp1", "fsdp2"):
        from torchport_fsdp import FullyShardedDataParallelPlugin

        if cell.dimension:
            return FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=["Block"])
        ways = {"": "FULL_SHARD", "full": "FULL_SHARD", "grad-op": "SHARD_GRAD_OP", "hybrid": "HYBRID_SHARD"}
        return FullyShardedDataParallelPlugin(
            fsdp_version=int(cell.strategy[-1]),
            sharding_strategy=ways[way],
            shard_group_size=max(1, cell.processes // 2) if way == "hybrid" else 0,
            transformer_cls_names_to_wrap=["Block"],
        )
    return cell.strategy


def mesh_of(cell: Cell):
    from torchport.utils import ParallelismConfig, TorchTensorParallelConfig

    sizes = {f"{cell.dimension}_size": 2, "dp_shard_size": cell.shares}
    if cell.dimension == "tp":
        columns = dict.fromkeys(("query", "key", "value", "up"), "colwise")
        styles = {**columns, "out": "rowwise", "down": "rowwise"}
        sizes["tp_handler"] = TorchTensorParallelConfig(plan={f"blocks.*.{n}": s for n, s in styles.items()})
    return ParallelismConfig(**sizes)


def look(accelerator: Accelerator, model: nn.Module) -> dict:
    """Return what the run has become: by its plan, and by the objects that train."""
    plain = accelerator.unwrap_model(model)
    whole = sum(parameter.numel() for parameter in Network().parameters())
    seen = {
        "plan": [accelerator.plan.strategy, accelerator.plan.precision],
        "model": type(model).__name__,
        "layer": type(plain.blocks[1].up).__name__,
        "held": sum(held(parameter).numel() for parameter in plain.parameters()) / whole,
    }
    if accelerator.plan.parallelism is not None:
        seen["mesh"] = accelerator.plan.parallelism.describe()
    stage = getattr(model, "zero_optimization_stage", None)
    if stage is not None:
        inner = model.optimizer
        parts = inner.fp32_partitioned_groups_flat if stage() == 3 else inner.param_groups[0]["params"]
        seen |= {"stage": int(stage()), "stepped": sum(part.numel() for part in parts) / whole}
    return seen


def held(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this process keeps of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's part, with ZeRO stage 3


def main() -> None:
    folder, cells = Path(sys.argv[1]), [Cell(**fields) for fields in json.loads(sys.argv[2])]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    with (folder / f"rank{os.environ.get('RANK', '0')}.jsonl").open("a") as out:

        def write(line: dict) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for cell in cells:
            write({"begins": cell.name})
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            started = time.process_time()
            try:
                result = run(cell)
            except TorchportError as error:
                result = {"refused": str(error)}
            faulthandler.cancel_dump_traceback_later()
            write({"cell": cell.name, "seconds": time.process_time() - started, **result})
    AcceleratorState._reset_state()


if __name__ == "__main__":
    main()
