"""Train with a schedule-free optimizer: no learning-rate schedule, and no need to know when training ends.

    pip install schedulefree
    torchport launch --num-processes 2 docs/examples/schedule_free.py

The optimizer keeps two points: gradients are computed at one, and the other, an average over all steps, is the
model to use. `optimizer.train()` and `optimizer.eval()` switch between them, wherever `model.train()` and
`model.eval()` stand, and before a checkpoint is saved. Look at the two losses of each epoch: that of the average is
mostly the lower one.

Defazio and others, "The Road Less Scheduled", NeurIPS 2024, https://arxiv.org/abs/2405.15682
"""

import argparse

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, set_seed


@torch.no_grad()
def loss_on(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Return the mean loss over all images of all processes."""
    model.eval()
    losses = [
        accelerator.gather_for_metrics(nn.functional.cross_entropy(model(images), labels, reduction="none"))
        for images, labels in loader
    ]
    return torch.cat(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=5, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate; larger than with a schedule")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(42)
    training, held_out = digits()
    model = network()
    optimizer = AdamWScheduleFree(model.parameters(), lr=args.lr, warmup_steps=20)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, batch_size=16, shuffle=True),
        DataLoader(held_out, batch_size=64),
    )

    for epoch in range(args.epochs):
        model.train()
        optimizer.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        last = loss_on(accelerator, model, test_loader)
        optimizer.eval()
        average = loss_on(accelerator, model, test_loader)
        accelerator.print(f"epoch {epoch + 1}: held-out loss {last:.4f}, of the average {average:.4f}")
    score = accuracy(accelerator, model, test_loader)
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
