"""Compress gradients on their way between processes with a DDP communication hook.

    torchport launch --num-processes 2 docs/examples/ddp_comm_hook.py --hook bf16
    torchport launch --num-processes 2 docs/examples/ddp_comm_hook.py --hook power_sgd --wrapper fp16

fp16 and bf16 halve what is sent. PowerSGD sends factors of low rank instead of the matrices, once the first steps
have passed uncompressed. Compare the losses with those of `--hook no`: bf16 hardly changes them, PowerSGD does at
first. A single process sends nothing, so its losses are the same with every hook. The flag `torchport launch
--ddp-comm-hook` does the same for a script that says nothing about it.

Vogels and others, "PowerSGD", NeurIPS 2019, https://arxiv.org/abs/1905.13727
"""

import argparse

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, DDPCommunicationHookType, DistributedDataParallelKwargs, set_seed

HOOKS = [hook.value for hook in DDPCommunicationHookType]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=4, help="passes over the training images")
    parser.add_argument("--hook", choices=HOOKS, default="bf16", help="how gradients are compressed")
    parser.add_argument(
        "--wrapper", choices=["no", "fp16", "bf16"], default="no", help="a cast around the hook"
    )
    args = parser.parse_args()

    power_sgd = {"matrix_approximation_rank": 2, "start_powerSGD_iter": 10}
    ddp = DistributedDataParallelKwargs(
        comm_hook=args.hook,
        comm_wrapper=args.wrapper,
        comm_state_option=power_sgd if "power_sgd" in args.hook else {},
    )
    accelerator = Accelerator(kwargs_handlers=[ddp])
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

    for epoch in range(args.epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total / len(loader), "mean").item()
        accelerator.print(f"epoch {epoch + 1}: training loss {mean:.7f}")
    score = accuracy(accelerator, model, test_loader)
    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images with hook {args.hook}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
