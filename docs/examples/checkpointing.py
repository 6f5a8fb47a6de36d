"""Save checkpoints, amid an epoch too, and go on after an interruption as if there had been none.

    torchport launch --num-processes 2 docs/examples/checkpointing.py

Press Ctrl-C, or kill it, at any time; then give the same command again. It goes on with the batch after the newest
complete checkpoint, and ends with the result of an uninterrupted run, even with another number of processes. Amid an
epoch a checkpoint is written while the training goes on (`blocking=False`); it appears in one piece, so one that was
being written when the process died is not there. The two newest are kept. Look at `manifest.json` inside one.

After a finished run there is nothing left to do; `--output-dir` elsewhere begins anew.
"""

import argparse
from pathlib import Path

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, DataLoaderConfiguration, Progress, ProjectConfiguration, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=8, help="passes over the training images")
    parser.add_argument("--save-every", type=at_least_one, default=10, help="batches between checkpoints")
    parser.add_argument("--output-dir", default="runs/checkpointing", help="where checkpoints go")
    args = parser.parse_args()

    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, automatic_checkpoint_naming=True, total_limit=2
        ),
        resume="auto",
    )
    set_seed(42)
    training, held_out = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(held_out, batch_size=64),
    )
    progress = Progress(epoch=0, batches=0, loss=0.0)  # batches and the sum of their losses: of this epoch
    accelerator.register_for_checkpointing(progress)
    if accelerator.resume():  # the newest complete checkpoint, if there is one
        accelerator.print(f"resumed in epoch {progress.epoch + 1} after {progress.batches} batches")

    while progress.epoch < args.epochs:
        model.train()
        for images, labels in accelerator.skip_first_batches(loader, progress.batches):
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            progress.batches += 1
            progress.loss += accelerator.reduce(loss, "mean").item()
            if progress.batches % args.save_every == 0:
                folder = accelerator.save_state(blocking=False)
                accelerator.print(f"saving {Path(folder).name}", flush=True)
        accelerator.print(f"epoch {progress.epoch + 1}: mean loss {progress.loss / progress.batches:.6f}")
        progress.epoch, progress.batches, progress.loss = progress.epoch + 1, 0, 0.0
        accelerator.save_state()

    score = accuracy(accelerator, model, test_loader)
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images")
    accelerator.end_training()  # waits for what is still being written


if __name__ == "__main__":
    main()
