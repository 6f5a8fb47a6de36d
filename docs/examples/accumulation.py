"""Train with gradient accumulation in bfloat16: batches larger than fit into memory, one optimizer step for several.

    torchport launch --num-processes 2 --precision bf16 docs/examples/accumulation.py --accumulate 4

The precision is not named in the script: `--precision`, `TORCHPORT_PRECISION` or a YAML file chooses it.
"""

import argparse

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=4, help="passes over the training images")
    parser.add_argument("--accumulate", type=at_least_one, default=4, help="micro-batches per optimizer step")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(42)
    training, held_out = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = DataLoader(training, batch_size=8, shuffle=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=args.epochs * -(-len(loader) // args.accumulate)
    )
    model, optimizer, loader, scheduler, test_loader = accelerator.prepare(
        model, optimizer, loader, scheduler, DataLoader(held_out, batch_size=64)
    )

    updates = 0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    updates += 1
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        correct = accuracy(accelerator, model, test_loader)
        accelerator.print(f"epoch {epoch + 1}: {updates} updates, held-out accuracy {correct:.4f}")
    accelerator.print(f"accuracy {correct:.4f} in {accelerator.mixed_precision}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
