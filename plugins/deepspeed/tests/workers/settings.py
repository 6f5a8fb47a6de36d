"""Two processes: configuration files, several engines, large models, and what is refused."""

import copy
import json
import sys
from pathlib import Path

import deepspeed
import torch
from common import BATCH, make_data, make_model, new, one, prepared, train, whole
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchport import Accelerator
from torchport.errors import TorchportError
from torchport.state import AcceleratorState
from torchport.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, get_active_deepspeed_plugin

FOLDER = Path(sys.argv[1])
found = {}
FILE = {
    "zero_optimization": {
        "stage": "auto",
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def reports(function):
    """Keep what a function returns, or the error that it raises on purpose."""
    try:
        found[function.__name__] = function()
    except TorchportError as error:
        found[function.__name__] = str(error)
    return function


def wide():
    model = make_model()
    model.config = type("Config", (), {"hidden_size": 33})()
    return model


@reports
def described():
    plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(FILE), zero_stage=1)
    accelerator = new(plugin, gradient_accumulation_steps=3)
    model = wide()
    optimizer = DummyOptim(model.parameters(), lr=0.04, weight_decay=0.1)
    scheduler = DummyScheduler(optimizer, total_num_steps=16, warmup_num_steps=8)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(make_data(), BATCH), scheduler
    )
    rates = []
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            one(accelerator, model, optimizer, inputs, labels, False)
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    config = accelerator.deepspeed_plugin.deepspeed_config
    kept = {name: value for name, value in config.items() if name != "steps_per_print"}
    return {"config": kept, "rates": rates, "optimizer": type(model.basic_optimizer).__name__}


@reports
def without_width():
    file = copy.deepcopy(FILE) | {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"}
    }
    accelerator = new(DeepSpeedPlugin(hf_ds_config=file))
    model = make_model()
    optimizer = DummyOptim(model.parameters())
    return accelerator.prepare(model, optimizer, DummyScheduler(optimizer))


@reports
def two_optimizers():
    accelerator = new(DeepSpeedPlugin(hf_ds_config=copy.deepcopy(FILE), zero_stage=1))
    model = wide()
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


@reports
def half_precision():
    return prepared(new(DeepSpeedPlugin(zero_stage=2), mixed_precision="fp16"))


@reports
def precision_of_the_file():
    file = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    return new(DeepSpeedPlugin(hf_ds_config=file)).mixed_precision


@reports
def precisions_that_disagree():
    file = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    return prepared(new(DeepSpeedPlugin(hf_ds_config=file), mixed_precision="bf16"))


@reports
def several():
    plugins = {"student": DeepSpeedPlugin(zero_stage=2), "teacher": DeepSpeedPlugin(zero_stage=3)}
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(deepspeed_plugins=plugins)
    results = {"first": get_active_deepspeed_plugin(accelerator.state) is plugins["student"]}
    student, optimizer, loader = prepared(accelerator)
    before, backward = whole(accelerator, student), accelerator._bound.backward
    accelerator.state.select_deepspeed_plugin("teacher")
    results["second"] = accelerator.deepspeed_plugin is plugins["teacher"]
    teacher = accelerator.prepare(make_model(1))
    results["partitioned"] = [p.numel() for p in teacher.module.parameters()]
    results["kept"] = accelerator._bound.backward == backward
    losses = []
    for inputs, _ in loader:
        with torch.no_grad():
            target = teacher(inputs)
        loss = mse_loss(student(inputs), target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    results["learns"] = losses[-1] < losses[0] and whole(accelerator, student) != before
    second = Accelerator()
    second.state.select_deepspeed_plugin("student")
    results["own"] = len(train(second, *prepared(second), clip=False))
    try:
        prepared(accelerator)
    except TorchportError as error:
        results["refused"] = str(error)
    return results


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, inputs):
        return self.inner(inputs)


@reports
def large():
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True, transformer_moe_cls_names="Expert")
    accelerator = new(plugin)
    with accelerator._contents.strategy.model_init_context():
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), Expert(), torch.nn.Linear(16, 4))
    results = {"held": [p.numel() for p in model.parameters()], "enabled": plugin.is_zero3_init_enabled()}
    with plugin.zero3_init_context_manager(enable=False):
        results["inside"] = plugin.is_zero3_init_enabled()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(make_data(), BATCH)
    )
    results["leaf"] = deepspeed.utils.z3_leaf_module(model.module[1])
    results["losses"] = len(train(accelerator, model, optimizer, loader))
    state = accelerator.get_state_dict(model)
    results["whole"] = {name: list(value.shape) for name, value in state.items()}
    return results


@reports
def saved_alone():
    accelerator = new(DeepSpeedPlugin(zero_stage=3))
    model = prepared(accelerator)[0]
    texts = {}
    saves = {
        "weights": lambda: accelerator.get_state_dict(model),
        "checkpoint": lambda: accelerator.save_state(FOLDER / "alone"),
    }
    for what, save in saves.items() if accelerator.is_main_process else ():
        try:
            save()
        except TorchportError as error:
            texts[what] = str(error)
    torch.distributed.barrier()
    accelerator.save_state(FOLDER / "together")
    return texts | {
        "then": sorted(path.name for path in FOLDER.glob("*") if (path / "manifest.json").is_file())
    }


@reports
def clipped_otherwise():
    accelerator = new(DeepSpeedPlugin(zero_stage=1, gradient_clipping=1.0))
    return train(accelerator, *prepared(accelerator))


@reports
def uneven():
    accelerator = new(DeepSpeedPlugin(zero_stage=1))
    with accelerator.join_uneven_inputs([prepared(accelerator)[0]]):
        return "joined"


@reports
def on_disk():
    folder = FOLDER / "nvme"
    plugin = DeepSpeedPlugin(
        zero_stage=3, offload_optimizer_device="nvme", offload_optimizer_nvme_path=str(folder)
    )
    accelerator = new(plugin)
    return train(accelerator, *prepared(accelerator), clip=False)


accelerator = new(DeepSpeedPlugin(zero_stage=0))
(FOLDER / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.end_training()
