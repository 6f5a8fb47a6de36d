"""Metrics over all processes that are exactly those of one process, also when the last batch is uneven.

    torchport launch --num-processes 2 docs/examples/metrics.py

There are 359 held-out images in batches of 64, so the last one has 39, which two processes cannot share evenly: one
image is seen twice so that both have as many. `gather` returns it twice; `gather_for_metrics` returns each image
once, in the order of the data set. A metric that is no mean over batches, such as the F1 score, needs all
predictions together; scikit-learn computes it here.

`split_batches` makes 64 the batch size of all processes together, so that one and two processes train alike and
print the same.
"""

import argparse

import torch
from arguments import at_least_one
from digits import digits, network
from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, DataLoaderConfiguration, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=at_least_one, default=6, help="passes over the training images")
    args = parser.parse_args()

    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
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

    model.train()
    for _ in range(args.epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    scores, truth, plain = [], [], 0
    with torch.no_grad():
        for images, labels in test_loader:
            logits = model(images)
            plain += len(accelerator.gather(labels))
            both = accelerator.gather_for_metrics((logits, labels))
            scores.append(both[0])
            truth.append(both[1])
    scores, truth = torch.cat(scores).cpu(), torch.cat(truth).cpu()
    guesses = scores.argmax(dim=1)

    if accelerator.is_main_process:
        print(f"gather returned {plain} labels, gather_for_metrics {len(truth)} of {len(held_out)}")
        print(f"in the order of the data set: {torch.equal(truth, held_out.tensors[1])}")
        print(f"macro F1 {f1_score(truth, guesses, average='macro'):.6f}")
        print(f"among the best two {top_k_accuracy_score(truth, scores, k=2):.6f}")
        print(confusion_matrix(truth, guesses))
    accelerator.end_training()


if __name__ == "__main__":
    main()
