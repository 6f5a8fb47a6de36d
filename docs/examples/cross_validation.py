"""Cross-validation: one model per fold, whose predictions for the images it has not seen are gathered.

    torchport launch --num-processes 2 docs/examples/cross_validation.py --folds 5

Look at the last two lines. Each image outside the held-out set is predicted once, by the one model that was not
trained on it; the held-out images are predicted by all models, and their mean is better than most of them alone.
"""

import argparse

import torch
from arguments import at_least_one
from digits import digits, network
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchport import Accelerator, set_seed


def train(accelerator: Accelerator, data: Dataset, epochs: int) -> nn.Module:
    """Train a new model on the data."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return model


def predict(accelerator: Accelerator, model: nn.Module, data: Dataset) -> torch.Tensor:
    """Return the probabilities of the ten digits for each image, in the order of the data, on every process."""
    model.eval()
    loader = accelerator.prepare(DataLoader(data, batch_size=64))
    with torch.no_grad():
        parts = [accelerator.gather_for_metrics(model(images).softmax(dim=1)) for images, _ in loader]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", type=int, default=4, help="number of folds")
    parser.add_argument("--epochs", type=at_least_one, default=3, help="passes over the images of each fold")
    args = parser.parse_args()
    if args.folds < 2:
        parser.error("--folds must be at least 2: one to train on, one to predict")

    accelerator = Accelerator()
    set_seed(42)
    data, held_out = digits()
    labels, truth = data.tensors[1], held_out.tensors[1]
    unseen = torch.full(
        (len(data), 10), torch.nan
    )  # probabilities from the model that has not seen the image
    votes = []
    folds = StratifiedKFold(args.folds, shuffle=True, random_state=0).split(torch.zeros(len(data)), labels)
    for fold, (training, validation) in enumerate(folds, start=1):
        model = train(accelerator, Subset(data, training), args.epochs)
        unseen[validation] = predict(accelerator, model, Subset(data, validation)).cpu()
        votes.append(predict(accelerator, model, held_out).cpu())
        share = (unseen[validation].argmax(dim=1) == labels[validation]).float().mean()
        alone = (votes[-1].argmax(dim=1) == truth).float().mean()
        accelerator.print(
            f"fold {fold}: {share:.4f} on {len(validation)} images, {alone:.4f} on the held-out ones"
        )
        (model,) = accelerator.free_memory(model)  # forget this fold's objects before the next

    predicted = int((~unseen.isnan().any(dim=1)).sum())
    score = (unseen.argmax(dim=1) == labels).float().mean()
    accelerator.print(f"out of fold: accuracy {score:.4f} on {predicted} images")
    score = (torch.stack(votes).mean(dim=0).argmax(dim=1) == truth).float().mean()
    accelerator.print(f"all {args.folds} models: accuracy {score:.4f} on {len(truth)} held-out images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
