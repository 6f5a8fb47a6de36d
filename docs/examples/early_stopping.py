"""Stop all processes at the same step because of what one of them has seen.

    torchport launch --num-processes 2 docs/examples/early_stopping.py --target 0.1

Each process watches the loss of its own batches. The first whose mean over the last steps is below the target calls
`set_trigger`; `check_trigger`, called by all, tells all of them. A `break` on one process alone would leave the
others waiting for its gradients for ever.

A figure that all processes know, such as an accuracy gathered from all, needs no trigger: all decide alike.
"""

import argparse
from collections import deque

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, set_seed
from torchport.utils import gather_object


class LowLoss:
    """True once the mean of the last losses is below a target."""

    def __init__(self, target: float, window: int = 10) -> None:
        self.target = target
        self.losses = deque(maxlen=window)

    def reached(self, loss: float) -> bool:
        self.losses.append(loss)
        full = len(self.losses) == self.losses.maxlen
        return full and sum(self.losses) / len(self.losses) < self.target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=at_least_one, default=10, help="most passes over the training images"
    )
    parser.add_argument("--target", type=float, default=0.2, help="mean loss at which to stop")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(42)
    training, held_out = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, batch_size=16, shuffle=True),
        DataLoader(held_out, batch_size=64),
    )

    low_loss = LowLoss(args.target)
    mine, stopped, step = False, False, 0
    for _ in range(args.epochs):
        model.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if low_loss.reached(loss.item()):
                mine = True
                accelerator.set_trigger()
            if stopped := accelerator.check_trigger():
                break
        if stopped:
            break

    ends = gather_object([(accelerator.process_index, step, mine)])
    for rank, end, triggered in ends if accelerator.is_main_process else ():
        print(f"process {rank} stopped at step {end}{': its loss was low enough' if triggered else ''}")
    score = accuracy(accelerator, model, test_loader)
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images after {step} steps")
    accelerator.end_training()


if __name__ == "__main__":
    main()
