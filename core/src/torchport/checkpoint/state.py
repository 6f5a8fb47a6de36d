"""Save and load the state of a run: models, optimizers, schedulers, samplers, random numbers, custom objects."""

from __future__ import annotations

import functools
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchport.checkpoint import atomic
from torchport.checkpoint.weights import load_weights, save_weights
from torchport.checkpoint.writer import FolderWriter
from torchport.errors import CheckpointError
from torchport.ops import exchange
from torchport.plugin.precision import Precision
from torchport.plugin.strategy import Strategy
from torchport.runtime import Runtime
from torchport.training.random import rng_states, set_rng_states

MODEL_NAME = "pytorch_model"
SAFE_MODEL_NAME = "model"
OPTIMIZER_NAME = "optimizer"
SCHEDULER_NAME = "scheduler"
SAMPLER_NAME = "sampler"
SCALER_NAME = "scaler.pt"
RNG_STATE_NAME = "random_states"
CUSTOM_NAME = "custom_checkpoint"


@dataclass(slots=True)
class Contents:
    """The objects whose state a checkpoint holds."""

    runtime: Runtime
    strategy: Strategy
    precision: Precision
    models: list[torch.nn.Module] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    custom: list[Any] = field(default_factory=list)


def save(
    contents: Contents, target: Path, *, safe_serialization: bool, leader: bool, facts: dict[str, Any]
) -> None:
    """Write a checkpoint; call it on every process.

    Args:
        contents: What to save.
        target: The folder; an older checkpoint there is replaced when the new one is complete.
        safe_serialization: Whether weights are written as safetensors.
        leader: Whether this process makes the folder and writes what all processes share.
        facts: What the manifest should say besides.

    Raises:
        CheckpointError: on every process, if any of them could not write its part; nothing is left behind.
    """
    token = exchange.broadcast_object_list([secrets.token_hex(4)])[0]
    folder = target.parent / f".{target.name}.writing-{token}"
    _together("make the folder", target, lambda: atomic.make_folder(folder, target) if leader else None)
    try:
        written = _together("write", target, lambda: _write(contents, folder, safe_serialization, leader))
        own = written[
            contents.runtime.topology.rank
        ]  # where machines share no disk, names may be those of others
        known = {name: facts for files in (*written, own) for name, facts in files.items()}
        _together(
            "complete", target, lambda: atomic.publish(folder, target, facts, known) if leader else None
        )
    except CheckpointError:
        if leader:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load(contents: Contents, source: Path, *, strict: bool = True) -> dict[str, Any]:
    """Verify a checkpoint and load it; call it on every process.

    Args:
        contents: What to load into.
        source: The folder.
        strict: Whether the model's weights must match by name.

    Returns:
        The manifest.

    Raises:
        CheckpointError: if the checkpoint is incomplete, damaged, or was made of other objects.
    """
    manifest = atomic.verify(source)
    _check_counts(contents, manifest, source)
    for index, model in enumerate(contents.models):
        safe = source / f"{_numbered(SAFE_MODEL_NAME, index)}.safetensors"
        state = (
            load_weights(safe) if safe.is_file() else _read(source / f"{_numbered(MODEL_NAME, index)}.bin")
        )
        try:
            contents.strategy.load_model_state_dict(model, state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights in {source} do not fit the model", reason=str(error)
            ) from error
    model = contents.models[0] if contents.models else torch.nn.Module()
    for index, optimizer in enumerate(contents.optimizers):
        state = _read(source / f"{_numbered(OPTIMIZER_NAME, index)}.bin")
        contents.strategy.load_optimizer_state_dict(model, optimizer.optimizer, state)
    for index, scheduler in enumerate(contents.schedulers):
        scheduler.load_state_dict(_read(source / f"{_numbered(SCHEDULER_NAME, index)}.bin"))
    for index, loader in enumerate(contents.loaders):
        _load_order(loader, _read(source / f"{_numbered(SAMPLER_NAME, index)}.bin"))
    if (source / SCALER_NAME).is_file():
        contents.precision.load_state_dict(_read(source / SCALER_NAME))
    for index, thing in enumerate(contents.custom):
        thing.load_state_dict(_read(source / f"{CUSTOM_NAME}_{index}.pkl"))
    states = source / f"{RNG_STATE_NAME}_{contents.runtime.topology.rank}.pkl"
    if states.is_file():  # a rank that the saving job did not have keeps its own random numbers
        set_rng_states(_read(states), contents.runtime)
    return manifest


def newest(folder: Path) -> Path:
    """Return the newest complete checkpoint of a folder of numbered ones.

    Raises:
        CheckpointError: if there is none.
    """
    complete = [path for path in numbered(folder) if (path / atomic.MANIFEST).is_file()]
    if not complete:
        raise CheckpointError(f"there is no complete checkpoint in {folder}", hint="save_state() writes one")
    return complete[-1]


def numbered(folder: Path) -> list[Path]:
    """Return the folders `checkpoint_0`, `checkpoint_1`, … in order of their numbers."""
    found = {}
    for path in folder.glob("checkpoint_*"):
        match = re.fullmatch(r"checkpoint_(\d+)", path.name)
        if match:
            found[int(match[1])] = path
    return [found[number] for number in sorted(found)]


def make_room(folder: Path, limit: int) -> None:
    """Delete the oldest numbered checkpoints until `limit` are left."""
    found = numbered(folder)
    for path in found[: max(0, len(found) - limit)]:
        shutil.rmtree(path)


def _together(doing: str, target: Path, action: Callable[[], Any]) -> list[Any]:
    """Do something on every process, and fail on all of them if it fails on one; return what each returned."""
    problem, value = "", None
    try:
        value = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    results = exchange.gather_object([(problem, value)])
    problems = [(rank, text) for rank, (text, _) in enumerate(results) if text]
    if problems:
        raise CheckpointError(
            f"the checkpoint {target} could not be saved",
            found="; ".join(f"rank {rank} could not {doing}: {text}" for rank, text in problems),
            reason="an older checkpoint of that name is still whole",
        )
    return [value for _, value in results]


def _write(
    contents: Contents, folder: Path, safe_serialization: bool, leader: bool
) -> dict[str, dict[str, Any]]:
    """Write this process's files; return size and checksum of each by name."""
    backend, strategy = contents.runtime.backend, contents.strategy
    with FolderWriter(folder) as writer:

        def write(name: str, value: Any, save: Callable[[Any, Path], Any] = backend.save) -> None:
            writer.write(name, functools.partial(save, value))

        for index, model in enumerate(contents.models):
            state = strategy.model_state_dict(model)
            if leader and safe_serialization:
                write(f"{_numbered(SAFE_MODEL_NAME, index)}.safetensors", state, save_weights)
            elif leader:
                write(f"{_numbered(MODEL_NAME, index)}.bin", state)
        model = contents.models[0] if contents.models else torch.nn.Module()
        for index, optimizer in enumerate(contents.optimizers):
            state = strategy.optimizer_state_dict(model, optimizer.optimizer)
            if leader:
                write(f"{_numbered(OPTIMIZER_NAME, index)}.bin", state)
        write(f"{RNG_STATE_NAME}_{contents.runtime.topology.rank}.pkl", rng_states(contents.runtime))
        if not leader:
            return writer.files
        for index, scheduler in enumerate(contents.schedulers):
            write(f"{_numbered(SCHEDULER_NAME, index)}.bin", scheduler.state_dict())
        for index, loader in enumerate(contents.loaders):
            write(f"{_numbered(SAMPLER_NAME, index)}.bin", _order(loader))
        scaler = contents.precision.state_dict()
        if scaler:
            write(SCALER_NAME, scaler)
        for index, thing in enumerate(contents.custom):
            write(f"{CUSTOM_NAME}_{index}.pkl", thing.state_dict())
    return writer.files


def _read(path: Path) -> Any:
    """Read a file of tensors and plain values; code in it is never run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not complete", found=f"{path.name} is missing") from error
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read", reason=str(error).splitlines()[0], hint="an older checkpoint"
        ) from error


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name}_{index}"


def _check_counts(contents: Contents, manifest: dict[str, Any], source: Path) -> None:
    for kind, objects in _counted(contents).items():
        saved = manifest.get("objects", {}).get(kind)
        if saved is not None and saved != len(objects):
            raise CheckpointError(
                f"{source} was made of other objects",
                found=f"it holds {saved} {kind}, and {len(objects)} are prepared or registered now",
                hint="prepare the same objects in the same order before load_state()",
            )


def _counted(contents: Contents) -> dict[str, Sequence[Any]]:
    return {
        "models": contents.models,
        "optimizers": contents.optimizers,
        "schedulers": contents.schedulers,
        "loaders": contents.loaders,
        "custom objects": contents.custom,
    }


def counts(contents: Contents) -> dict[str, int]:
    """Return how many objects of each kind a checkpoint holds, for its manifest."""
    return {kind: len(objects) for kind, objects in _counted(contents).items()}


def _order(loader: Any) -> dict[str, Any]:
    """Return the state of a loader's order: its generator and epoch."""
    sampler, generator = _sampler(loader), loader.synchronized_generator
    return {
        "generator": None if generator is None else generator.get_state(),
        "epoch": getattr(sampler, "epoch", None),
        "initial_seed": getattr(sampler, "initial_seed", None),
    }


def _load_order(loader: Any, state: dict[str, Any]) -> None:
    sampler = _sampler(loader)
    if state["generator"] is not None and loader.synchronized_generator is not None:
        loader.synchronized_generator.set_state(state["generator"])
    for name in ("epoch", "initial_seed"):
        if state[name] is not None and hasattr(sampler, name):
            setattr(sampler, name, state[name])


def _sampler(loader: Any) -> Any:
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)
