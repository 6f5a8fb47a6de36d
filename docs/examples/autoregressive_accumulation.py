"""Accumulate gradients of a language model so that every token weighs the same, as in one big batch.

    python docs/examples/autoregressive_accumulation.py --micro-batch 32                                # one batch
    torchport launch --num-processes 2 docs/examples/autoregressive_accumulation.py --micro-batch 4     # the same
    python docs/examples/autoregressive_accumulation.py --micro-batch 4 --by-micro-batch                # another

Lines of source text have different lengths, so micro-batches have different numbers of tokens. The mean over their
losses weighs the tokens of short lines more; with `num_items`, gradients are divided by the number of tokens in all
micro-batches of all processes. Look at the losses: the first two commands print the same, up to rounding, because
each optimizer step sees the same `--batch-size` lines. The third is what averaging over micro-batches does.
"""

import argparse

import torch
from arguments import at_least_one
from language_model import CONTEXT, ByteTransformer, library_text
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchport import Accelerator, DataLoaderConfiguration, set_seed

IGNORED = -100  # a target that counts for no loss: padding


def lines(text: bytes) -> list[torch.Tensor]:
    """Return the lines that have code, each with its line break, as bytes; long ones are cut."""
    return [torch.tensor(list(line[: CONTEXT + 1])) for line in text.splitlines(True) if len(line) > 2]


def collate(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes and the byte that follows each (batch x longest line), padded at the right."""
    inputs = pad_sequence([line[:-1] for line in batch], batch_first=True)
    targets = pad_sequence([line[1:] for line in batch], batch_first=True, padding_value=IGNORED)
    return inputs, targets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=at_least_one, default=60, help="optimizer steps")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=32, help="lines per optimizer step, of all"
    )
    parser.add_argument("--micro-batch", type=at_least_one, default=4, help="lines per process at a time")
    parser.add_argument(
        "--by-micro-batch", action="store_true", help="weigh micro-batches, not tokens, equally"
    )
    args = parser.parse_args()

    config = DataLoaderConfiguration(use_seedable_sampler=True)  # one order for any number of processes
    accelerator = Accelerator(dataloader_config=config)
    micro_batches, rest = divmod(args.batch_size, args.micro_batch * accelerator.num_processes)
    if rest or not micro_batches:
        parser.error(
            f"{accelerator.num_processes} x {args.micro_batch} lines do not divide {args.batch_size}"
        )
    accelerator.gradient_accumulation_steps = micro_batches
    set_seed(42)
    model = ByteTransformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = lines(library_text()[0])
    data = data[: min(args.steps, len(data) // args.batch_size) * args.batch_size]  # whole steps
    loader = DataLoader(data, batch_size=args.micro_batch, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step, sums = 0, torch.zeros(2, device=accelerator.device)  # of losses, of tokens
    for inputs, targets in loader:
        tokens = (targets != IGNORED).sum()
        with accelerator.accumulate(model, num_items=None if args.by_micro_batch else tokens):
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        sums += torch.stack([loss.detach() * tokens, tokens])
        if accelerator.sync_gradients:
            step += 1
            total, count = accelerator.reduce(sums, "sum").tolist()
            if step % 5 == 0:
                accelerator.print(f"step {step}: loss {total / count:.6f} over {count:.0f} tokens")
            sums.zero_()
    accelerator.print(f"{micro_batches} micro-batches of {args.micro_batch} lines on each process")
    accelerator.end_training()


if __name__ == "__main__":
    main()
