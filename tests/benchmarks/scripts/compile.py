"""Train a transformer of equal blocks from a cold start: `compile.py eager|whole|regions BLOCKS`.

Prints JSON: `first`, the seconds of the first forward and backward, `processor`, the processor time that it took (that
of the C++ compiler included), and `step`, the seconds of one step after it.
"""

import json
import os
import statistics
import sys
import time

import torch
from torchport import Accelerator
from torchport.utils import TorchDynamoPlugin

WIDTH, HEADS, LENGTH, BATCH, STEPS = 256, 4, 64, 4, 15


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.before(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(torch.nn.functional.gelu(self.up(self.between(x))))


class Transformer(torch.nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.head = torch.nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    mode, blocks = sys.argv[1], int(sys.argv[2])
    plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=mode == "regions")
    accelerator = Accelerator(cpu=True, dynamo_plugin=None if mode == "eager" else plugin)
    torch.manual_seed(0)
    model = accelerator.prepare(Transformer(blocks))
    tokens = torch.randint(256, (BATCH, LENGTH))

    def step() -> float:
        started = time.perf_counter()
        logits = model(tokens)
        accelerator.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        model.zero_grad()
        return time.perf_counter() - started

    before = sum(os.times()[:4])
    first = step()
    processor = sum(os.times()[:4]) - before
    print(
        json.dumps(
            {"first": first, "processor": processor, "step": statistics.median(step() for _ in range(STEPS))}
        )
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
