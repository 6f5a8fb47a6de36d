"""Find the largest batch that fits into memory, and make up for a smaller one by accumulating gradients.

    torchport launch --num-processes 2 docs/examples/memory.py --limit 1.5

A computer's memory is not worth filling for an example. Therefore the limit is a simulation: what PyTorch keeps for
the backward pass is really counted, and beyond `--limit` MiB the error that a full device raises is raised by hand.
Without the simulation, the lines with `Memory` are left out and the rest stays as it is.

Look at the attempts: the batch is halved until it fits, and each optimizer step is still about `--batch-size` images,
so that the training is the same whatever the limit. What occupies memory is made inside `train`, after
`free_memory`, so that the next attempt finds the memory free.
"""

import argparse

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, find_executable_batch_size, set_seed


class Memory(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for its backward pass, and raises when there are too many."""

    def __init__(self, limit: float) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self.limit, self.used = limit * 2**20, 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.used += tensor.nbytes
        if self.used > self.limit:
            raise RuntimeError(f"out of memory (simulated): {self.used / 2**20:.2f} MiB needed so far")
        return tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=6, help="passes over the training images")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=64, help="images per optimizer step, of all"
    )
    parser.add_argument("--limit", type=float, default=1.0, help="simulated memory of each process in MiB")
    args = parser.parse_args()

    accelerator = Accelerator()
    training, held_out = digits()

    @find_executable_batch_size(starting_batch_size=max(1, args.batch_size // accelerator.num_processes))
    def train(batch_size: int) -> tuple[nn.Module, DataLoader]:
        accelerator.print(f"trying {batch_size} images per process")
        accelerator.free_memory()
        set_seed(42)
        accelerator.gradient_accumulation_steps = max(
            1, args.batch_size // (batch_size * accelerator.num_processes)
        )
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        model, optimizer, loader, test_loader = accelerator.prepare(
            model,
            optimizer,
            DataLoader(training, batch_size=batch_size, shuffle=True, drop_last=True),
            DataLoader(held_out, batch_size=64),
        )
        for _ in range(args.epochs):
            for images, labels in loader:
                with accelerator.accumulate(model):
                    with Memory(args.limit):
                        loss = nn.functional.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
        accelerator.print(
            f"{batch_size} images per process and {accelerator.gradient_accumulation_steps} micro-batches per step"
        )
        return model, test_loader

    score = accuracy(accelerator, *train())
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
