"""Errors instead of waiting: what takes every process says so when only some of them have come."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torchport.errors import CheckpointError, ConfigurationError
from torchport.plugin import Topology
from torchport.runtime import Runtime

PATIENCE = "TORCHPORT_DEEPSPEED_SAVE_TIMEOUT"
"""Variable with the seconds that a save waits for the other processes to come (default 120)."""

_SAVES = ("save_checkpoint", "save_16bit_model", "save_fp16_model")
_count = [0]


def patience() -> timedelta:
    """Return how long to wait for other processes.

    Raises:
        ConfigurationError: if the variable is not a number.
    """
    text = os.environ.get(PATIENCE) or "120"
    try:
        return timedelta(seconds=float(text))
    except ValueError as error:
        raise ConfigurationError(f"{PATIENCE} must be a number of seconds", found=repr(text)) from error


def come(what: str, topology: Topology) -> None:
    """Wait until every process is here, through the job's key-value store.

    Args:
        what: What is about to be done, for the error.
        topology: The place of this process.

    Raises:
        CheckpointError: naming the processes that have not come in time.
    """
    store = Runtime.store
    if topology.world_size == 1 or store is None:
        return
    prefix = f"torchport/deepspeed/{Runtime.generation}/{_count[0]}"
    keys = [f"{prefix}/{rank}" for rank in range(topology.world_size)]
    store.set(keys[topology.rank], "1")
    try:
        store.wait(keys, patience())
    except RuntimeError as error:  # torch's DistStoreError
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        store.delete_key(keys[topology.rank])
        raise CheckpointError(
            f"{what} takes every process, and {len(missing)} of {topology.world_size} did not come",
            found=f"rank {', '.join(missing)} did not call it within {patience().total_seconds():g} s",
            reason="each process holds a part of the states",
            hint=f"call it outside of `if accelerator.is_main_process`; {PATIENCE} says how long to wait",
        ) from error
    _count[0] += 1


def guard(engine: Any, topology: Topology) -> None:
    """Let the saving methods of an engine wait for every process, and fail if some do not come."""
    for name in _SAVES:
        method = getattr(engine, name, None)
        if method is not None:
            object.__setattr__(engine, name, _guarded(method, name, topology))


def _guarded(method: Callable[..., Any], name: str, topology: Topology) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        come(f"{name}()", topology)
        return method(*args, **kwargs)

    return guarded
