"""Train a small byte-level transformer on the source text of Python's standard library: real text, no download.

    python docs/examples/language_model.py
    torchport launch --num-processes 2 docs/examples/language_model.py --steps 400

Look at the bits per byte on modules that the model has not seen: 8 is knowing nothing, less is better. At the end
it continues a line of code. The weights stay in `--output-dir`, where distributed_inference.py can use them.
"""

import argparse
import itertools
import math
import sysconfig
from pathlib import Path

import torch
from arguments import at_least_one
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, set_seed

CONTEXT = 64


def library_text(modules: int = 40) -> tuple[bytes, bytes]:
    """Return the source text of some modules for training, and that of a tenth as many others."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_bytes() for path in paths[: modules + modules // 10]]
    return b"".join(texts[:modules]), b"".join(texts[modules:])


def windows(text: bytes) -> TensorDataset:
    """Cut a text into windows of `CONTEXT` bytes, with one byte more: the last to predict."""
    whole = torch.tensor(list(text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)]))
    return TensorDataset(whole.view(-1, CONTEXT + 1))


class ByteTransformer(nn.Module):
    """Two layers, about 140,000 parameters; maps bytes (batch x length) to scores of the byte that follows each."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers)
        self.scores = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        past = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        return self.scores(self.layers(self.bytes(text) + self.positions[:length], mask=past, is_causal=True))


def loss_of(model: nn.Module, text: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of each byte given those before it, in nats."""
    return nn.functional.cross_entropy(
        model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def continue_text(model: nn.Module, prompt: str, length: int = 40) -> str:
    """Add the most likely bytes to a prompt, up to the end of its line."""
    model.eval()
    device = next(model.parameters()).device
    text = list(prompt.encode())
    for _ in range(length):
        text.append(int(model(torch.tensor([text[-CONTEXT:]], device=device))[0, -1].argmax()))
        if text[-1] == ord("\n"):
            break
    return bytes(text).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=at_least_one, default=300, help="optimizer steps")
    parser.add_argument("--batch-size", type=at_least_one, default=16, help="windows per process and step")
    parser.add_argument("--output-dir", default="runs/language_model", help="where the weights go")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(42)
    training, held_out = (windows(text) for text in library_text())
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, batch_size=args.batch_size, shuffle=True),
        DataLoader(held_out, batch_size=64),
    )

    def endless():
        while True:
            yield from loader

    model.train()
    for step, (text,) in enumerate(itertools.islice(endless(), args.steps), start=1):
        loss = loss_of(model, text)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps:
            accelerator.print(f"step {step}: training loss {loss.item() / math.log(2):.3f} bits per byte")

    model.eval()
    with torch.no_grad():
        losses = [
            accelerator.gather_for_metrics(loss_of(model, text, "none").view(len(text), -1))
            for (text,) in test_loader
        ]
    bits = torch.cat(losses).mean().item() / math.log(2)
    accelerator.print(f"held-out text: {bits:.3f} bits per byte")

    accelerator.save_model(model, args.output_dir)
    if accelerator.is_main_process:
        print(repr(continue_text(accelerator.unwrap_model(model), "    def __init__(self")))
    accelerator.end_training()


if __name__ == "__main__":
    main()
