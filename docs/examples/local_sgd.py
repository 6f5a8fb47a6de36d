"""Local SGD: processes train apart for some steps and then average their parameters, to communicate less.

    torchport launch --num-processes 2 docs/examples/local_sgd.py --local-steps 8
    torchport launch --num-processes 2 docs/examples/local_sgd.py --local-steps 0    # averages gradients every step

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767
"""

import argparse

import torch
from arguments import at_least_one
from digits import accuracy, digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, set_seed
from torchport.local_sgd import LocalSGD
from torchport.logging import get_logger
from torchport.utils import tqdm

logger = get_logger(__name__, log_level="INFO")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=4, help="passes over the training images")
    parser.add_argument("--local-steps", type=int, default=8, help="steps between averages; 0: synchronous")
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

    for epoch in range(args.epochs):
        model.train()
        with LocalSGD(accelerator, model, args.local_steps, enabled=args.local_steps > 0) as local_sgd:
            for images, labels in tqdm(loader, desc=f"epoch {epoch + 1}", leave=False):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
        score = accuracy(accelerator, model, test_loader)  # the parameters have been averaged
        logger.info("epoch %d: held-out accuracy %.4f", epoch + 1, score)

    accelerator.print(f"accuracy {score:.4f} on {len(held_out)} held-out images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
