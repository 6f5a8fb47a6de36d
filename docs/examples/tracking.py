"""Record what happens: hyper-parameters, the loss of each step and the accuracy of each epoch.

    torchport launch --num-processes 2 docs/examples/tracking.py
    tail -f runs/tracking/digits.jsonl                                          # in another terminal
    TORCHPORT_TRACKERS=jsonl,tensorboard python docs/examples/tracking.py       # where that plugin is installed

The script names no tracker but its default: `TORCHPORT_TRACKERS` chooses among those that `torchport plugins` lists.
Only the main process writes, so `log` is called on all of them without asking which this is. Look at the loss: it
is averaged over processes first, as each of them knows its own batches only.
"""

import argparse
import os

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
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--output-dir", default="runs/tracking", help="where trackers put their files")
    args = parser.parse_args()

    chosen = None if os.environ.get("TORCHPORT_TRACKERS") else "jsonl"
    accelerator = Accelerator(log_with=chosen, project_dir=args.output_dir)
    set_seed(42)
    training, held_out = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, batch_size=16, shuffle=True),
        DataLoader(held_out, batch_size=64),
    )
    accelerator.init_trackers("digits", config={**vars(args), "processes": accelerator.num_processes})

    step = 0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                accelerator.log({"loss": accelerator.reduce(loss, "mean").item()}, step=step)
        score = accuracy(accelerator, model, test_loader)
        accelerator.log({"accuracy": score, "epoch": epoch + 1}, step=step)
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images; see {args.output_dir}")
    accelerator.end_training()  # closes the trackers


if __name__ == "__main__":
    main()
