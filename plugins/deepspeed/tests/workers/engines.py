"""Two processes: the strategy deepspeed beside hand-written DeepSpeed and hand-written DDP, over the same batches."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from common import BATCH, CLIP, STEPS, make_data, make_model, momenta, new, prepared, train, whole
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from torchport.utils import DeepSpeedPlugin

FOLDER = Path(sys.argv[1])
found = {}


def own_share(rank):
    """The batches of one rank, as a prepared loader deals them."""
    return [batch for index, batch in enumerate(DataLoader(make_data(), BATCH)) if index % 2 == rank]


def by_hand(rank, stage):
    model = make_model()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": STEPS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    losses = []
    for inputs, labels in own_share(rank):
        loss = cross_entropy(engine(inputs), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def by_ddp(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for number, (inputs, labels) in enumerate(own_share(rank)):
        loss = cross_entropy(model(inputs), labels)
        (loss / STEPS).backward()
        if number % STEPS == STEPS - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Stream(IterableDataset):
    """40 samples, and no length."""

    def __iter__(self):
        yield from make_data(40)


def with_sgd(accelerator, data):
    model = make_model()
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(data, BATCH))


accelerator = new(DeepSpeedPlugin(zero_stage=0))
RANK = accelerator.process_index
found["ddp"] = by_ddp(RANK)
for stage in range(4):
    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = prepared(accelerator)
    results = {"losses": train(accelerator, model, optimizer, loader), "weights": whole(accelerator, model)}
    folder = FOLDER / f"checkpoint_{stage}"
    accelerator.save_state(folder)
    results["momenta"] = momenta(accelerator, model, optimizer)
    results["on"] = train(accelerator, model, optimizer, loader)
    results["hand"] = by_hand(RANK, stage)

    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = prepared(accelerator)
    inputs, labels = next(iter(DataLoader(make_data(), BATCH)))
    with accelerator.accumulate(model):  # a window that is begun, and given up
        accelerator.backward(100 * cross_entropy(model(inputs), labels))
    accelerator.load_state(folder)
    results["loaded"] = whole(accelerator, model)
    results["loaded momenta"] = momenta(accelerator, model, optimizer)
    results["resumed"] = train(accelerator, model, optimizer, loader)

    accelerator = new(
        DeepSpeedPlugin(zero_stage=stage, gradient_clipping=CLIP, gradient_accumulation_steps=STEPS)
    )
    results["steps"] = accelerator.gradient_accumulation_steps
    results["counted"] = train(accelerator, *prepared(accelerator), inside=False, clip=False)

    # 5 batches of each process: the last window is of one batch, and no loader says so before
    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = with_sgd(accelerator, Stream())
    train(accelerator, model, optimizer, loader, clip=False)
    results["stream"] = whole(accelerator, model)

    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = with_sgd(accelerator, make_data())
    for number, (inputs, labels) in enumerate(loader):
        items = 1 + (number + RANK) % BATCH
        with accelerator.accumulate(model, num_items=items, reduction="sum"):
            accelerator.backward(cross_entropy(model(inputs[:items]), labels[:items], reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()
    results["items"] = whole(accelerator, model)
    found[f"stage {stage}"] = results

for device in ("optimizer", "param"):
    plugin = DeepSpeedPlugin(zero_stage=3, **{f"offload_{device}_device": "cpu"})
    accelerator = new(plugin, gradient_accumulation_steps=STEPS)
    found[f"offload {device}"] = train(accelerator, *prepared(accelerator))
accelerator = new(DeepSpeedPlugin(zero_stage=2), gradient_accumulation_steps=STEPS, mixed_precision="bf16")
found["bf16"] = train(accelerator, *prepared(accelerator))

found["folder"] = str(FOLDER)
(FOLDER / f"rank{RANK}.json").write_text(json.dumps(found))
accelerator.end_training()
