"""Train a small convolutional net on scikit-learn's digits: real images, no download.

torchport launch --num-processes 2 docs/examples/digits.py
torchport launch --num-processes 2 docs/examples/digits.py --resume      # goes on from the last checkpoint
"""

import argparse
import time
from pathlib import Path

import torch
from arguments import at_least_one
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, Progress, set_seed
from tqdm import tqdm


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return four fifths of the 1,797 images (1 x 8 x 8, values 0 to 1) for training, and the held-out fifth."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    return TensorDataset(images[training], labels[training]), TensorDataset(
        images[held_out], labels[held_out]
    )


def network() -> nn.Module:
    """Two convolutions and two linear layers, about 40,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Return the share of images that the model recognises, over all processes."""
    model.eval()
    right, seen = 0, 0
    with torch.no_grad():
        for images, labels in loader:
            guesses, truth = accelerator.gather_for_metrics((model(images).argmax(dim=1), labels))
            right += int((guesses == truth).sum())
            seen += len(truth)
    return right / seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=8, help="passes over the training images")
    parser.add_argument("--batch-size", type=at_least_one, default=16, help="images per process and step")
    parser.add_argument("--output-dir", default="runs/digits", help="where the checkpoint goes")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    args = parser.parse_args()
    started = time.perf_counter()

    accelerator = Accelerator()
    set_seed(42)
    if accelerator.is_main_process:
        print(accelerator.plan.explain())

    training, held_out = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(training, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(held_out, batch_size=64)
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)

    progress = Progress(epochs=0, accuracy=0.0)
    accelerator.register_for_checkpointing(progress)
    checkpoint = Path(args.output_dir) / "checkpoint"
    if args.resume:
        accelerator.load_state(checkpoint)
        accelerator.print(f"resumed after epoch {progress.epochs}")

    while progress.epochs < args.epochs:
        model.train()
        bar = tqdm(
            loader, desc=f"epoch {progress.epochs + 1}", disable=not accelerator.is_main_process, leave=False
        )
        for images, labels in bar:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        progress.epochs += 1
        progress.accuracy = accuracy(accelerator, model, test_loader)
        accelerator.print(f"epoch {progress.epochs}: held-out accuracy {progress.accuracy:.4f}")
        accelerator.save_state(checkpoint)

    accelerator.print(
        f"accuracy {progress.accuracy:.4f} on {len(held_out)} held-out images"
        f" after {progress.epochs} epochs, {time.perf_counter() - started:.1f} s"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
