"""Save and load the state of a run: models, optimizers, schedulers, samplers, random numbers, custom objects."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchport.checkpoint import atomic, shards
from torchport.checkpoint.agreement import Agreement
from torchport.checkpoint.plain import plain, reason_of
from torchport.checkpoint.reshard import derive_rng_states, load_scheduler, total_batch
from torchport.checkpoint.weights import (
    check_tensors,
    load_model_state,
    load_weights,
    model_state,
    save_weights,
)
from torchport.checkpoint.work import WorkFolder
from torchport.checkpoint.writer import FolderWriter
from torchport.errors import CheckpointError
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


@dataclass(slots=True)
class Part:
    """What one process adds to a checkpoint.

    Attributes:
        files: What it is still to write.
        written: Size and checksum of files that it has written already, by their path inside.
    """

    files: list[File]
    written: dict[str, dict[str, Any]]


@dataclass(slots=True)
class File:
    """A file that this process writes.

    Attributes:
        name: Its path inside the checkpoint.
        state: What goes into it.
        save: Writes `state` to a path.
    """

    name: str
    state: Any
    save: Callable[[Any, Path], Any]


def gather(
    contents: Contents,
    work: WorkFolder,
    agreement: Agreement,
    *,
    safe_serialization: bool,
    leader: bool,
    hooks: Sequence[Callable[..., Any]] = (),
) -> Part:
    """Make the temporary folder and return what this process adds to it; call it on every process.

    States are collected on all processes, as for some strategies that takes all of them, before any is written. A
    strategy that saves its states in parts writes them here: that may take all processes too.

    Args:
        contents: What to save.
        work: The temporary folder.
        agreement: With the other processes.
        safe_serialization: Whether weights are written as safetensors.
        leader: Whether this process writes what all processes share.
        hooks: What to call with the models, the list of their states and the temporary folder, before what is
            left in the list is written.

    Raises:
        CheckpointError: on every process, if any of them could not do its part.
    """
    agreement.step(work.open, "make the folder")
    divided = bool(contents.strategy.shards)
    agreement.step(lambda: work.check(divided), "find the folder that the others write into")
    weights: list[dict[str, Any]] = []
    files: list[File] = []
    agreement.step(lambda: _collect(contents, leader, weights, files), "write")

    def run_hooks() -> None:
        collected = list(weights)
        for hook in hooks:
            hook(list(contents.models), weights, str(work.path))
        if leader:
            places = _places(collected, weights)
            files[:0] = [_weights_file(contents, *place, safe_serialization) for place in places]

    agreement.step(run_hooks, "write")
    written: list[dict[str, dict[str, Any]]] = []
    if contents.strategy.shards:
        agreement.step(lambda: written.append(_write_shards(contents, work.path, agreement)))
    return Part(files, written[0] if written else {})


def write(
    part: Part,
    work: WorkFolder,
    target: Path,
    agreement: Agreement,
    *,
    rank: int,
    leader: bool,
    shared: bool,
    facts: dict[str, Any],
) -> None:
    """Write files and put the checkpoint in place; call it on every process, in any thread.

    Args:
        part: What this process adds.
        work: The temporary folder.
        target: The checkpoint's folder; an older checkpoint there is replaced when the new one is complete.
        agreement: With the other processes.
        rank: Index of this process.
        leader: Whether this process completes the checkpoint.
        shared: Whether the files of all processes belong into it, and not those of one machine only.
        facts: What the manifest should say besides.

    Raises:
        CheckpointError: on every process, if any of them could not do its part, or if its files are elsewhere.
    """

    def write_mine() -> dict[str, dict[str, Any]]:
        with FolderWriter(work.path) as writer:
            for file in part.files:
                writer.write(file.name, functools.partial(file.save, file.state))
        return writer.files | part.written

    written = agreement.step(write_mine, "write")
    known = {name: described for listed in written for name, described in listed.items()}
    if not shared:  # names may be those of other machines
        known = {name: described for name, described in known.items() if (work.path / name).is_file()}
        known |= written[rank]
    agreement.step(lambda: atomic.publish(work.path, target, facts, known) if leader else None, "complete")


def load(
    contents: Contents, source: Path, agreement: Agreement, *, hooks: Sequence[Callable[..., Any]] = ()
) -> dict[str, Any]:
    """Verify a checkpoint and load it; call it on every process.

    The processes of a machine share the work of verifying.

    Args:
        contents: What to load into.
        source: The folder.
        agreement: With the other processes.
        hooks: What to call with a list of the models and the folder; models they take out are not loaded.

    Returns:
        The manifest.

    Raises:
        CheckpointError: on every process, if the checkpoint is incomplete, damaged, or was made of other objects.
    """
    topology = contents.runtime.topology
    manifests: list[dict[str, Any]] = []

    def verify() -> None:
        manifests.append(atomic.verify(source, topology.local_rank, topology.local_world_size))
        _check_counts(contents, manifests[0], source)

    agreement.step(verify)
    models = list(contents.models)

    def prepare() -> None:
        for hook in hooks:
            hook(models, str(source))

    agreement.step(prepare, "run its load hooks")
    agreement.step(lambda: _restore(contents, source, agreement, models, manifests[0]))
    return manifests[0]


def _restore(
    contents: Contents,
    source: Path,
    agreement: Agreement,
    models: list[torch.nn.Module],
    manifest: dict[str, Any],
) -> None:
    strategy = contents.strategy
    wanted = {i: model for i, model in enumerate(contents.models) if any(model is one for one in models)}
    optimizers = dict(enumerate(contents.optimizers))
    owners = {index: _owner(contents.models, optimizer) for index, optimizer in optimizers.items()}
    if written := str(manifest.get("shards", "")):
        inner = {index: optimizer.optimizer for index, optimizer in optimizers.items()}
        shards.load(strategy, wanted, inner, owners, source, written)
        wanted, optimizers = {}, {}

    def read(action: Callable[[], Any]) -> Any:
        """Read on every process before any of them goes on: loading may take all of them."""
        states: list[Any] = []
        agreement.step(lambda: states.append(action()))
        return states[0]

    for index, model in wanted.items():
        state = read(functools.partial(_read_weights, source, index))
        try:
            load_model_state(strategy, model, state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights in {source} do not fit the model", reason=str(error)
            ) from error
    for index, optimizer in optimizers.items():
        state = read(functools.partial(_read_optimizer, source, index, optimizer))
        strategy.load_optimizer_state_dict(owners[index], optimizer.optimizer, state)
    for index, scheduler in enumerate(contents.schedulers):
        state = _read(source / f"{_numbered(SCHEDULER_NAME, index)}.bin")
        load_scheduler(scheduler, state, index, manifest, total_batch(contents.loaders))
    for index, loader in enumerate(contents.loaders):
        _load_order(loader, _read(source / f"{_numbered(SAMPLER_NAME, index)}.bin"))
    if (source / SCALER_NAME).is_file():
        contents.precision.load_state_dict(_read(source / SCALER_NAME))
    for index, thing in enumerate(contents.custom):
        thing.load_state_dict(_read(source / f"{CUSTOM_NAME}_{index}.pkl"))
    _restore_rng(source, int(manifest.get("world_size", 1)), contents.runtime)


def _read_optimizer(source: Path, index: int, optimizer: torch.optim.Optimizer) -> Any:
    """Read an optimizer's state, and refuse that of another kind.

    Releases of PyTorch add settings to a kind; one kind has settings that the other lacks only if they are two.
    """
    state = _read(source / f"{_numbered(OPTIMIZER_NAME, index)}.bin")
    ours, saved = (
        {name for group in groups for name in group}
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if ours - saved and saved - ours:
        raise CheckpointError(
            f"{_numbered(OPTIMIZER_NAME, index)}.bin was saved by another kind of optimizer",
            found=f"settings {', '.join(sorted(saved - ours))}, and none of {', '.join(sorted(ours - saved))}",
            hint="prepare the optimizer that was saved",
        )
    return state


def _restore_rng(source: Path, saved_by: int, runtime: Runtime) -> None:
    """Restore the random states of this process, or derive those of one that the saving job did not have."""
    rank = runtime.topology.rank
    path = source / f"{RNG_STATE_NAME}_{rank % saved_by}.pkl"
    if rank < saved_by:
        set_rng_states(_read(path), runtime)
    else:
        derive_rng_states(_read(path), rank, runtime)


def _collect(contents: Contents, leader: bool, weights: list[dict[str, Any]], files: list[File]) -> None:
    """Collect all states, on every process alike, though the leader alone writes most of them.

    A state that cannot be had is reported after the others have been collected: other processes take part in
    those.
    """
    strategy, save = contents.strategy, contents.runtime.backend.save
    problems: list[Exception] = []

    def collect(name: str, thing: Any, state: Callable[[], Any], mine: bool = leader) -> None:
        try:
            value = state()
            if mine and value is not None:
                files.append(File(name, plain(value, f"{type(thing).__name__} ({name})"), save))
        except Exception as error:
            problems.append(error)

    for model in () if strategy.shards else contents.models:
        try:
            weights.append(model_state(strategy, model))
        except Exception as error:
            problems.append(error)
    for index, optimizer in () if strategy.shards else enumerate(contents.optimizers):
        inner, owner = optimizer.optimizer, _owner(contents.models, optimizer)
        state = functools.partial(strategy.optimizer_state_dict, owner, inner)
        collect(f"{_numbered(OPTIMIZER_NAME, index)}.bin", inner, state)
    for index, scheduler in enumerate(contents.schedulers):
        inner = getattr(scheduler, "scheduler", scheduler)
        collect(f"{_numbered(SCHEDULER_NAME, index)}.bin", inner, scheduler.state_dict)
    for index, loader in enumerate(contents.loaders):
        collect(f"{_numbered(SAMPLER_NAME, index)}.bin", loader, functools.partial(_order, loader))
    collect(SCALER_NAME, contents.precision, lambda: contents.precision.state_dict() or None)
    for index, thing in enumerate(contents.custom):
        collect(f"{CUSTOM_NAME}_{index}.pkl", thing, thing.state_dict)
    runtime = contents.runtime
    name = f"{RNG_STATE_NAME}_{runtime.topology.rank}.pkl"
    collect(name, runtime, functools.partial(rng_states, runtime), mine=True)
    if problems:
        raise problems[0]


def _write_shards(contents: Contents, folder: Path, agreement: Agreement) -> dict[str, dict[str, Any]]:
    models = dict(enumerate(contents.models))
    optimizers = {index: optimizer.optimizer for index, optimizer in enumerate(contents.optimizers)}
    return shards.save(contents.strategy, models, optimizers, folder, agreement, contents.runtime.topology)


def _weights_file(contents: Contents, index: int, state: Any, safe_serialization: bool) -> File:
    """Return the file of a model's weights."""
    if safe_serialization:
        check_tensors(state)
        return File(f"{_numbered(SAFE_MODEL_NAME, index)}.safetensors", state, save_weights)
    name = f"{_numbered(MODEL_NAME, index)}.bin"
    return File(name, plain(state, f"the model ({name})"), contents.runtime.backend.save)


def _places(collected: list[Any], left: list[Any]) -> list[tuple[int, Any]]:
    """Return what hooks left in the list of states, each with the number of its model.

    A state that a hook put there itself takes the first free number.
    """
    own = {id(state): index for index, state in enumerate(collected)}
    taken = {own[id(state)] for state in left if id(state) in own}
    free = (index for index in itertools.count() if index not in taken)
    return [(own[id(state)] if id(state) in own else next(free), state) for state in left]


def _owner(models: Sequence[torch.nn.Module], optimizer: Any) -> torch.nn.Module:
    """Return the model to which most of an optimizer's parameters belong."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    shares = [sum(id(parameter) in held for parameter in model.parameters()) for model in models]
    return models[shares.index(max(shares))] if shares else torch.nn.Module()


def _read_weights(source: Path, index: int) -> Any:
    safe = source / f"{_numbered(SAFE_MODEL_NAME, index)}.safetensors"
    if safe.is_file():
        return load_weights(safe)
    path = source / f"{_numbered(MODEL_NAME, index)}.bin"
    if not path.is_file():
        raise CheckpointError(
            f"{source} has no weights of model {index}",
            reason="a save hook took them out of its list of weights",
            hint="register_load_state_pre_hook(hook), with a hook that loads them and takes the model out of its list",
        )
    return _read(path)


def _read(path: Path) -> Any:
    """Read a file of tensors and plain values; code in it is never run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is damaged", found=f"{path.name} is missing", hint=atomic.others(path.parent)
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read", reason=reason_of(error), hint=atomic.others(path.parent)
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
    return loader.order_state()  # type: ignore[no-any-return]


def _load_order(loader: Any, state: dict[str, Any]) -> None:
    loader.load_order_state(state)
