"""Where a loader stands, as a checkpoint holds it.

A place in an epoch is counted in batches of the loader as the user made it, over all processes. It means the same
to any number of processes: where they take batches of another size than before, it is converted into samples.
"""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from torchport.data.iterable import IterableDatasetShard, Place, has_state
from torchport.data.order import Beginning, Resumed, epoch_counter, generator_holder
from torchport.data.samplers import BEGINNING, SHARES, Start, takes_batches_of_a_sampler
from torchport.errors import ConfigurationError
from torchport.runtime import Runtime
from torchport.training.random import host_rng_states, set_host_rng_states

if TYPE_CHECKING:
    from torchport.data.loader import DataLoaderShard


def save_order(loader: DataLoaderShard) -> dict[str, Any]:
    """Return what the next epoch of a loader is drawn from; amid an epoch, where it stands.

    Returns:
        Tensors and plain values.
    """
    generator, counter = loader.synchronized_generator, epoch_counter(loader.given_sampler)
    running, resumed = loader.order.running, loader.order.resumed
    if running is None and resumed is not None:
        return resumed.state
    began = None if running is None else running.beginning
    finished = running is not None and running.finished
    state = {
        "generator": None if generator is None else generator.get_state(),
        "host": None,
        "epoch": getattr(counter, "epoch", None),
        "initial_seed": getattr(counter, "initial_seed", None),
        "amid_epoch": began is not None and not finished,
        "finished": began is not None and finished,
        "dataset": loader.user_dataset.state_dict() if loader.keeps_place else None,
    }
    if running is None or began is None:
        return state
    state["generator"] = began.generator
    if finished:
        return state
    start = running.start
    return state | {
        "host": began.host,
        "epoch": began.epoch,
        "batches": start.batches + running.given * running.step,
        "samples": start.samples,
        "batch_size": _size(loader),
        "workers": loader.num_workers,
        "last_reader": running.last_reader,
        "dataset": None if running.dataset is None else pickle.loads(running.dataset),
        "readers": [
            [number, pickle.loads(place.dataset), place.ended, place.count]
            for number, place in sorted(running.places.items())
        ],
    }


def load_order(loader: DataLoaderShard, state: dict[str, Any]) -> None:
    """Let the next pass of a loader go on from what `save_order` returned.

    Raises:
        ConfigurationError: if the loader's batches or workers cannot go on where those of the checkpoint stood.
    """
    order, sampler = loader.order, loader.given_sampler
    state = own_part(state)
    order.running = order.resumed = None
    if state["generator"] is not None:
        _set_generator(loader, state["generator"])
        if state.get("finished") and loader.synchronized_generator is not None:
            host = host_rng_states()
            for _ in sampler:  # what the sampler had left to draw when its last batch was given out
                pass
            set_host_rng_states(host)
    counter = epoch_counter(sampler)
    for name in ("epoch", "initial_seed"):
        if state[name] is not None and hasattr(counter, name):
            setattr(counter, name, state[name])
    if loader.keeps_place and state.get("dataset") is not None:
        loader.user_dataset.load_state_dict(state["dataset"])
        loader._iterator = None  # workers that persist hold a copy with another state
    if state.get("amid_epoch"):
        order.resumed = _resumed(loader, state)


def own_part(state: dict[str, Any], parts: int = 0, part: int = 0) -> dict[str, Any]:
    """Return the state of this process, where each reads its own part of a data set that divides itself.

    Args:
        state: What `order_state` returned.
        parts: Number of parts of the loader; 0 where the data set does not divide itself.
        part: Which of them this process reads.

    Raises:
        ConfigurationError: if the state is one amid an epoch of another number of parts.
    """
    saved: list[dict[str, Any]] = state.get("parts") or []
    if len(saved) == parts:
        return saved[part] if parts else state
    if state.get("amid_epoch"):
        raise ConfigurationError(
            "a checkpoint says where each process stood in its own part of an iterable data set",
            found=f"{len(saved) or 'no'} parts then, {parts or 'none'} now",
            reason="what is left of an epoch cannot be divided differently",
            hint="the number of processes and the dispatch_batches of the checkpoint until the epoch has ended",
        )
    return state | {"dataset": None}


def skip_rounds(loader: DataLoaderShard, start: Start) -> int:
    """Return how many rounds of a data set without a sampler come before a place.

    Raises:
        ConfigurationError: if the place is amid a round.
    """
    rounds, left = divmod(start.batches, loader.step)
    if left or start.samples:
        raise ConfigurationError(
            "a checkpoint was saved amid what is one round of batches now",
            found=f"{start.batches} batches given; {loader.step} make a round",
            reason="an iterable data set cannot be divided differently amid an epoch",
            hint="the number of processes, or the size of their batches together, of the checkpoint",
        )
    return rounds


def tell_what_is_left_out(loader: DataLoaderShard, start: Start) -> None:
    """Warn on the main process that a pass goes on amid an epoch: a script may be about to skip batches itself.

    Args:
        loader: The loader.
        start: Where it goes on; at the beginning, nothing is said.
    """
    runtime = Runtime.current
    if start == BEGINNING or (runtime is not None and runtime.topology.rank != 0):
        return
    batches, amid_round = divmod(start.batches, loader.step)
    used, same = "the samples", ""  # by another number of processes, or in batches of another size
    if not amid_round and not start.samples:
        used = "the first batch" if batches == 1 else f"the first {batches} batches"
        same = f"skip_first_batches(loader, {batches}) does the same without this warning, "
    warnings.warn(
        f"the loader of {type(loader.user_dataset).__name__} goes on amid an epoch: it leaves out {used} that the"
        f" epoch had before the checkpoint. Do not skip them again; {same}skip_first_batches(loader, 0) begins the"
        " epoch anew.",
        stacklevel=5,  # the script's loop: behind __iter__, _batches and _begin
    )


def _set_generator(loader: DataLoaderShard, state: torch.Tensor) -> None:
    holder = generator_holder(loader.given_sampler)
    if loader.synchronized_generator is None and holder is not None and holder.generator is None:
        holder.generator = loader.synchronized_generator = torch.Generator()
    if loader.synchronized_generator is not None:
        loader.synchronized_generator.set_state(state)


def _resumed(loader: DataLoaderShard, state: dict[str, Any]) -> Resumed:
    beginning = Beginning(state["generator"], state["host"], state["epoch"])
    start = _start(loader, state)
    places: dict[int, Place] = {}
    following = 0
    if loader.keeps_place:
        readers, workers = max(1, int(state["workers"])), max(1, loader.num_workers)
        if readers != workers and state["readers"]:
            raise ConfigurationError(
                "a checkpoint says where each worker of a loader stood in its data set",
                found=f"{state['workers']} workers then, {loader.num_workers} now",
                hint=f"num_workers={state['workers']} until the epoch has ended",
            )
        following = (int(state["last_reader"]) + 1) % workers
        places = {
            int(number): Place(pickle.dumps(dataset), bool(ended), int(count))
            for number, dataset, ended, count in state["readers"]
        }
    return Resumed(beginning, start, places, following, state)


def _start(loader: DataLoaderShard, state: dict[str, Any]) -> Start:
    """Return the place of a checkpoint in the batches of this loader."""
    batches, samples = int(state.get("batches", 0)), int(state.get("samples", 0))
    then, now = state.get("batch_size"), _size(loader)
    if then == now or not batches:
        return Start(batches, samples)
    if then is None or now is None:
        raise ConfigurationError(
            "the batches of a loader are not those of the checkpoint",
            found=f"batch size {then or 'varying'} then, {now or 'varying'} now",
            reason="the place where the epoch goes on cannot be found among other batches",
            hint="the batch sampler of the checkpoint until the epoch has ended",
        )
    return Start(*divmod(batches * int(then) + samples, now))


def _size(loader: DataLoaderShard) -> int | None:
    """Return the size of the batches of the loader as the user made it; `None` where they vary."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDatasetShard):
        return dataset.batch_size
    if isinstance(dataset, IterableDataset) or loader.source is not None:
        return loader.batch_size
    sampler = loader.given_sampler
    while isinstance(sampler, SHARES):
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    if loader.batch_sampler is None or not takes_batches_of_a_sampler(sampler):
        return None
    return int(sampler.batch_size)


__all__ = ["has_state", "load_order", "own_part", "save_order", "skip_rounds", "tell_what_is_left_out"]
