"""From a plugin's configuration and what is prepared to the configuration that an engine is given."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torchport.errors import ConfigurationError, UnavailableError

from torchport_deepspeed import ds_config
from torchport_deepspeed.config import DeepSpeedPlugin
from torchport_deepspeed.dummies import DummyOptim, DummyScheduler
from torchport_deepspeed.vendor import can_build

_MIXED = ("bf16", "fp16")


def resolve(
    plugin: DeepSpeedPlugin,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    schedulers: Sequence[Any],
    batch_sizes: Sequence[int],
    *,
    precision: str,
    world_size: int,
    accumulation: int,
    scheduler_divisor: int,
) -> ds_config.Resolution:
    """Work out the configuration of an engine.

    Args:
        plugin: Whose configuration.
        model: What the engine is for.
        optimizer: Its optimizer; `None` for inference.
        schedulers: The schedulers that are prepared with it.
        batch_sizes: Those of each process, of the loaders that are prepared with it.
        precision: Name of the run's precision.
        world_size: Number of processes.
        accumulation: Micro-batches for each step, as the accelerator has it.
        scheduler_divisor: By how many steps of a script's scheduler the engine's own step counts.

    Raises:
        ConfigurationError: if something has no value, or things do not fit together.
        UnavailableError: if what is asked for cannot work on this machine.
    """
    config = copy.deepcopy(plugin.deepspeed_config)
    _check_roles(config, optimizer, schedulers)
    made = ds_config.Resolution(config)
    _fill_precision(made, precision)
    made.fill("gradient_accumulation_steps", accumulation, "the accelerator's")
    _fill_batches(made, plugin, batch_sizes, world_size)
    made.fill("gradient_clipping", 0.0, "as the script clips")
    _fill_optimizer(made, optimizer)
    _fill_scheduler(made, schedulers, scheduler_divisor)
    _fill_sizes(made, model)
    made.drop("zero_optimization.", "DeepSpeed's default")
    for name in _MIXED:
        made.drop(f"{name}.", "DeepSpeed's default")
    made.finish()
    _check_offload(config)
    if optimizer is None:
        config.pop("optimizer", None)
        config.pop("scheduler", None)
    elif not isinstance(optimizer, DummyOptim):
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", math.inf)
    return made


def _fill_precision(made: ds_config.Resolution, precision: str) -> None:
    """Let the engine work in the run's precision, unless it autocasts by itself."""
    autocast = ds_config.get(made.config, "torch_autocast.enabled") is True
    for name in _MIXED:
        place, wanted = f"{name}.enabled", precision == name and not autocast
        there = ds_config.get(made.config, place)
        if there == ds_config.AUTO:
            made.fill(place, wanted, f"precision {precision!r}")
        elif there is None:
            if wanted or ds_config.get(made.config, name) is not None:
                ds_config.put(made.config, place, wanted)
        elif bool(there) != wanted:
            raise ConfigurationError(
                f"the precision of this run is {precision!r}, and the DeepSpeed configuration has {place}:"
                f" {str(there).lower()}",
                hint=f'precision {name!r}, or {place}: "auto"'
                if there
                else f'{place}: "auto", or another precision',
            )
    if ds_config.get(made.config, "fp16.enabled") is True:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise UnavailableError(
                "precision 'fp16' with the strategy 'deepspeed'",
                reason=f"DeepSpeed has no fp16 on this {get_accelerator().device_name()!r}",
                hint="precision bf16, or another strategy",
            )


def _fill_batches(
    made: ds_config.Resolution, plugin: DeepSpeedPlugin, batch_sizes: Sequence[int], world_size: int
) -> None:
    """Fill the three sizes, of which DeepSpeed wants the product to fit."""
    config = made.config
    total, micro = "train_batch_size", "train_micro_batch_size_per_gpu"
    if ds_config.get(config, micro) is None and ds_config.get(config, total) in (None, ds_config.AUTO):
        ds_config.put(config, micro, ds_config.AUTO)
    if batch_sizes:
        size = min(batch_sizes) if plugin.is_train_batch_min else max(batch_sizes)
        made.fill(micro, size, "the loader's")
    else:
        made.fill(micro, 1, "no loader is prepared with the model")
    steps = int(ds_config.get(config, "gradient_accumulation_steps") or 1)
    size = ds_config.get(config, micro)
    if isinstance(size, int):
        made.fill(total, size * steps * world_size, f"{size} x {steps} steps x {world_size} processes")


def _fill_optimizer(made: ds_config.Resolution, optimizer: torch.optim.Optimizer | None) -> None:
    if "optimizer" not in made.config:
        return
    values: dict[str, Any] = {}
    if isinstance(optimizer, DummyOptim):
        values = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, **optimizer.kwargs}
    for name, value in values.items():
        made.fill(f"optimizer.params.{name}", value, "DummyOptim")
    for name in ("betas", "eps"):
        if ds_config.get(made.config, f"optimizer.params.{name}") == ds_config.AUTO:
            made.drop(f"optimizer.params.{name}", "DeepSpeed's default")
    if optimizer is None:
        made.config.pop("optimizer")
        made.config.pop("scheduler", None)
        return
    parameters = ds_config.get(made.config, "optimizer.params")
    kind = str(ds_config.get(made.config, "optimizer.type")).lower()
    offloaded = ds_config.get(made.config, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    if kind in ("adam", "adamw") and isinstance(parameters, dict) and "torch_adam" not in parameters:
        reason = can_build("CPUAdamBuilder" if offloaded else "FusedAdamBuilder")
        on_host = _on_host()
        if reason or on_host:
            why = "DeepSpeed would compile its own first" if not reason else f"DeepSpeed's own: {reason}"
            parameters["torch_adam"] = True
            made.lines.append(("optimizer.params.torch_adam", True, why))


def _on_host() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "cpu")


def _fill_scheduler(made: ds_config.Resolution, schedulers: Sequence[Any], divisor: int) -> None:
    dummy = next((one for one in schedulers if isinstance(one, DummyScheduler)), None)
    if "scheduler" not in made.config or dummy is None:
        return
    params = "scheduler.params"
    rate = ds_config.get(made.config, "optimizer.params.lr")
    if rate in (None, ds_config.AUTO):
        groups = getattr(dummy.optimizer, "param_groups", None)
        rate = getattr(dummy.optimizer, "lr", None) or (groups[0]["lr"] if groups else None)
    made.fill(f"{params}.warmup_min_lr", 0, "a warm-up begins at 0")
    made.fill_from(f"{params}.warmup_max_lr", lambda: rate, "the learning rate", "the optimizer has no lr")
    counted = f"DummyScheduler, / {divisor}" if divisor > 1 else "DummyScheduler"
    made.fill(f"{params}.warmup_num_steps", math.ceil(dummy.warmup_num_steps / divisor), counted)
    total = dummy.total_num_steps
    made.fill_from(
        f"{params}.total_num_steps",
        lambda: None if total is None else math.ceil(total / divisor),
        counted,
        "DummyScheduler(total_num_steps=...) does not say",
    )
    for name, value in dummy.kwargs.items():
        made.fill(f"{params}.{name}", value, "DummyScheduler")


def _fill_sizes(made: ds_config.Resolution, model: torch.nn.Module) -> None:
    """Fill the sizes of buffers from the width of the model, as Hugging Face's models tell it."""
    sizes = {
        "reduce_bucket_size": (lambda width: width * width, "hidden_size²"),
        "stage3_prefetch_bucket_size": (lambda width: int(0.9 * width * width), "0.9 x hidden_size²"),
        "stage3_param_persistence_threshold": (lambda width: 10 * width, "10 x hidden_size"),
    }
    width = hidden_size(model)
    for name, (size, origin) in sizes.items():
        made.fill_from(
            f"zero_optimization.{name}",
            lambda size=size: None if width is None else size(width),  # type: ignore[misc]
            origin,
            "the model has neither config.hidden_size nor config.hidden_sizes",
        )


def hidden_size(model: torch.nn.Module) -> int | None:
    """Return the width that a model's `config` tells: `hidden_size`, or the largest of `hidden_sizes`."""
    config: Any = getattr(model, "config", None)
    for candidate in (config, getattr(config, "text_config", None)):
        if isinstance(getattr(candidate, "hidden_size", None), int):
            return int(candidate.hidden_size)  # type: ignore[union-attr]
        if getattr(candidate, "hidden_sizes", None):
            return int(max(candidate.hidden_sizes))  # type: ignore[union-attr]
    return None


def _check_roles(
    config: dict[str, Any], optimizer: torch.optim.Optimizer | None, schedulers: Sequence[Any]
) -> None:
    """Check that what the script makes and what the configuration describes complete each other."""
    if optimizer is None:
        return
    problems = []
    dummy = isinstance(optimizer, DummyOptim)
    if "optimizer" in config and not dummy:
        problems.append("the configuration has an optimizer, and the script makes one: use DummyOptim")
    if "optimizer" not in config and dummy:
        problems.append("the script has a DummyOptim, and the configuration no optimizer")
    for scheduler in schedulers:
        if isinstance(scheduler, DummyScheduler):
            if "scheduler" not in config and scheduler.lr_scheduler_callable is None:
                problems.append("the script has a DummyScheduler, and the configuration no scheduler")
        elif "scheduler" in config:
            problems.append("the configuration has a scheduler, and the script makes one: use DummyScheduler")
        elif dummy:
            problems.append(
                "the configuration has an optimizer and no scheduler, and the script makes a scheduler for a"
                " DummyOptim: use DummyScheduler(optimizer, lr_scheduler_callable=...)"
            )
    if "scheduler" in config and not schedulers:
        config.pop("scheduler")
    if problems:
        raise ConfigurationError(
            "the script and the DeepSpeed configuration do not fit together",
            found="".join(f"\n    {problem}" for problem in problems),
        )


def _check_offload(config: dict[str, Any]) -> None:
    kinds = [
        kind
        for kind in ("offload_optimizer", "offload_param")
        if ds_config.get(config, f"zero_optimization.{kind}.device") == "nvme"
    ]
    if not kinds:
        return
    reason = can_build("AsyncIOBuilder")
    if reason:
        raise UnavailableError(
            f"{' and '.join(kinds)} to 'nvme'",
            found="DeepSpeed's asynchronous file access (async_io) cannot be built here",
            reason=reason,
            hint="apt-get install libaio-dev g++ (dnf install libaio-devel gcc-c++), or offload to 'cpu'",
        )
