"""What has to be worked out when a checkpoint is loaded by another number of processes than saved it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchport.runtime import Runtime
from torchport.training.random import derived_seed

STEPS = "scheduler_steps"
BATCH = "total_batch_size"


def derive_rng_states(states: dict[str, Any], rank: int, runtime: Runtime) -> None:
    """Seed all generators of a process that the saving job did not have, with `derived_seed`.

    Args:
        states: The random states of the process of rank `rank % world_size` of the job that saved.
        rank: The rank of this process.
        runtime: The run.
    """
    seed = derived_seed(states, rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    runtime.backend.seed(seed)


def scheduler_facts(schedulers: Sequence[Any], loaders: Sequence[Any]) -> dict[str, Any]:
    """Return what the manifest says about how schedulers step: steps for each update, samples of each update."""
    return {
        STEPS: [getattr(scheduler, "steps_per_update", None) for scheduler in schedulers],
        BATCH: _batch(loaders),
    }


def load_scheduler(
    scheduler: Any, state: dict[str, Any], index: int, facts: dict[str, Any], batch: Any
) -> None:
    """Load a scheduler so that its rates go on over the samples as they would have done.

    A prepared scheduler steps several times for each update of the optimizer: once for each batch of one process. A
    checkpoint keeps the meaning of a step, in samples. With another number of processes, another number of steps
    makes up an update. Where the schedule is a function of the script, which counts the steps of this job, the
    position is converted instead.

    Args:
        scheduler: The prepared scheduler.
        state: Its saved state.
        index: Its number.
        facts: The manifest.
        batch: Samples that all processes together take for each update now; `None` if not known.
    """
    scheduler.load_state_dict(state)
    before = (facts.get(STEPS) or [])[index : index + 1]
    if not before or not before[0] or not getattr(scheduler, "step_with_optimizer", False):
        return
    now = scheduler.steps_per_update
    growth = batch / facts[BATCH] if batch and facts.get(BATCH) else 1.0
    steps = before[0] * growth
    if steps == now:
        return
    if _function_of_script(scheduler.scheduler, state, now / steps):
        return
    if steps < 1 or steps != int(steps):
        warnings.warn(
            f"the learning rates of scheduler {index} go on with {now} steps for each update, though {steps:g} would"
            " cover as many samples as before: save and load with batches of which one is a multiple of the other",
            stacklevel=2,
        )
        return
    scheduler.steps_per_update = int(steps)


def total_batch(loaders: Sequence[Any]) -> int | None:
    """Return how many samples all processes together take at a time; `None` if no loader says."""
    return _batch(loaders)


def _batch(loaders: Sequence[Any]) -> int | None:
    sizes = [getattr(loader, "total_batch_size", None) for loader in loaders]
    return next((int(size) for size in sizes if size), None)


def _function_of_script(scheduler: Any, state: dict[str, Any], growth: float) -> bool:
    """Convert the position in a schedule that the script computes, if that gives the saved learning rates.

    Returns:
        Whether it has been converted.
    """
    functions = getattr(scheduler, "lr_lambdas", None)
    saved = state.get("_last_lr")
    position = int(state.get("last_epoch", 0))
    converted = position * growth
    if not functions or not saved or converted != int(converted):
        return False

    def rates(position: int) -> list[float]:
        pairs = zip(scheduler.base_lrs, functions, strict=True)
        return [float(base * function(position)) for base, function in pairs]

    def fits(found: list[float]) -> bool:
        return all(abs(a - b) <= 1e-9 * max(abs(a), abs(b)) for a, b in zip(found, saved, strict=True))

    if fits(rates(position)) or not fits(rates(int(converted))):
        return False
    scheduler.last_epoch = int(converted)
    scheduler._step_count = int(converted) + 1
    return True
