"""Record what runs, with one trace per rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchport.config.kwargs import ProfileKwargs
from torchport.errors import ConfigurationError


@contextmanager
def profile(handler: ProfileKwargs, rank: int) -> Iterator[torch.profiler.profile]:
    """Record with `torch.profiler.profile`, and write a Chrome trace per rank where a folder is given.

    Args:
        handler: What to record.
        rank: Index of this process, for the name of its trace, `profile_{rank}.json`.

    Warns:
        UserWarning: on rank 0, if a trace was wanted and the schedule skipped every step.

    Raises:
        ConfigurationError: for an activity or a schedule option that PyTorch does not know.
    """
    options: dict[str, Any] = {
        "record_shapes": handler.record_shapes,
        "profile_memory": handler.profile_memory,
        "with_stack": handler.with_stack,
        "with_flops": handler.with_flops,
        "with_modules": handler.with_modules,
        "on_trace_ready": handler.on_trace_ready,
    }
    if handler.activities is not None:
        options["activities"] = [_activity(name) for name in handler.activities]
    if handler.schedule_option is not None:
        try:
            options["schedule"] = torch.profiler.schedule(**handler.schedule_option)
        except TypeError as error:
            raise ConfigurationError(
                f"ProfileKwargs(schedule_option={handler.schedule_option}) is not a schedule",
                reason=str(error),
                hint="wait, warmup and active, and optionally repeat and skip_first",
            ) from error
    with torch.profiler.profile(**options) as profiler:
        yield profiler
    if handler.output_trace_dir is None:
        return
    if profiler.profiler is None:
        if rank == 0:
            warnings.warn(_nothing_recorded(handler, profiler.step_num), stacklevel=3)
        return
    folder = Path(handler.output_trace_dir)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"profile_{rank}.json"))


def _nothing_recorded(handler: ProfileKwargs, steps: int) -> str:
    return (
        f"nothing was recorded, and {handler.output_trace_dir} gets no trace: schedule_option="
        f"{handler.schedule_option} skips all of the {steps} steps; profiler.step() must be called after each"
    )


def _activity(name: str) -> Any:
    known = {label.lower(): value for label, value in torch.profiler.ProfilerActivity.__members__.items()}
    if name.lower() not in known:
        raise ConfigurationError(
            f"ProfileKwargs(activities=[{name!r}]) is not known", hint=f"one of {', '.join(sorted(known))}"
        )
    return known[name.lower()]
