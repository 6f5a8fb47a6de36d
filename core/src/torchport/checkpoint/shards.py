"""The part of a checkpoint that each process writes and reads by itself, where the strategy says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchport.checkpoint import atomic
from torchport.checkpoint.agreement import Agreement
from torchport.checkpoint.weights import load_model_state
from torchport.errors import CheckpointError
from torchport.plugin.specs import Topology
from torchport.plugin.strategy import Strategy


def save(
    strategy: Strategy,
    models: Mapping[int, torch.nn.Module],
    optimizers: Mapping[int, torch.optim.Optimizer],
    folder: Path,
    agreement: Agreement,
    topology: Topology,
) -> dict[str, dict[str, Any]]:
    """Let every process write its part, and return size and checksum of each file of it.

    Returns:
        For each file that this process has flushed and read back, by its path inside `folder`.
    """
    before = {path for path in folder.rglob("*") if path.is_file()}
    agreement.step(lambda: None)  # none writes before all have looked
    agreement.step(lambda: strategy.save_shards(models, optimizers, folder), "write")
    written = sorted(path for path in folder.rglob("*") if path.is_file() and path not in before)
    mine = written[topology.local_rank :: topology.local_world_size]
    described = {}
    for path in mine:
        atomic.flush(path)
        described[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "crc32": atomic.checksum(path),
        }
    return described


def load(
    strategy: Strategy,
    models: Mapping[int, torch.nn.Module],
    optimizers: Mapping[int, torch.optim.Optimizer],
    owners: Mapping[int, torch.nn.Module],
    folder: Path,
    written: str,
) -> None:
    """Load a state that was saved in parts; call it on every process.

    Args:
        strategy: The strategy of this run, which may be another than the one that saved.
        models: Models to load, by their number in the checkpoint.
        optimizers: Optimizers to load, by theirs.
        owners: For each optimizer, the model that its parameters belong to.
        folder: The checkpoint.
        written: The format that the checkpoint says it is in.

    Raises:
        CheckpointError: if this strategy cannot read that format.
    """
    if strategy.shards == written:
        strategy.load_shards(models, optimizers, folder)
        return
    from torchport.plugin import shards  # imports much of torch.distributed, which few runs need

    if written != shards.FORMAT:
        raise CheckpointError(
            f"{folder} was saved in parts, in the format {written!r}",
            found=f"the strategy {strategy.spec.name!r} of this run does not read it",
            hint="load it with the strategy that saved it, and save whole weights there: save_model()",
        )
    for index, model in models.items():
        load_model_state(strategy, model, shards.read_whole(shards.model_folder(folder, index)))
    for index, optimizer in optimizers.items():
        place = shards.optimizer_folder(folder, index)
        state = shards.join_optimizer_state(shards.read_whole(place), shards.read_plain(place))
        strategy.load_optimizer_state_dict(owners[index], optimizer, state)
