"""The random order of a loader: the same on every process, and the same again after a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from torchport.data.iterable import Place, Read
from torchport.data.samplers import (
    BEGINNING,
    SHARES,
    SeedableRandomSampler,
    Start,
    batches_from,
    chain,
    count_from,
    length_is_exact,
)
from torchport.errors import ConfigurationError
from torchport.ops import exchange
from torchport.runtime import Runtime
from torchport.training.random import host_rng_states, set_host_rng_states

_END: Any = object()


@dataclass(slots=True)
class Beginning:
    """The states that the order of an epoch was drawn from.

    Attributes:
        generator: State of the generator that belongs to the sampler or data set.
        host: States of this process's generators, where the order may depend on them.
        epoch: The epoch of a sampler that counts them.
    """

    generator: torch.Tensor | None = None
    host: dict[str, Any] | None = None
    epoch: int | None = None


@dataclass(slots=True)
class Resumed:
    """The epoch that the next pass goes on with, as a checkpoint says.

    Attributes:
        beginning: The states that its order was drawn from.
        start: Where it goes on.
        places: Where the readers of an iterable data set with a state stood, by number.
        next_reader: Number of the worker whose batch comes next.
        state: What the checkpoint says, as long as it has not been acted upon.
    """

    beginning: Beginning
    start: Start
    places: dict[int, Place]
    next_reader: int
    state: dict[str, Any]


@dataclass(slots=True)
class Epoch:
    """One pass over a loader.

    Attributes:
        beginning: The states its order was drawn from; `None` until it has been drawn.
        start: Where in the order it began.
        step: Batches of the unshared loader that a round takes.
        given: Rounds that have been given out since `start`.
        places: Where the readers of an iterable data set with a state stand behind the batch given last.
        last_reader: Number of the worker that gave it.
        dataset: State of the data set of this process when the pass began, pickled.
        reader: State of a reader that keeps one of its own, behind the batch given last.
        looks_ahead: Whether the sampler is asked for one item ahead, to know which is the last.
        handed: How many items the sampler has handed out, if it looks ahead.
        ended: Whether that was all of them.
        finished: Whether the last batch has been given out; the sampler may have something left to draw.
        before: Generators and their states to go back to before the order is drawn.
    """

    beginning: Beginning | None = None
    start: Start = BEGINNING
    step: int = 1
    given: int = 0
    places: dict[int, Place] = field(default_factory=dict)
    last_reader: int = -1
    dataset: bytes | None = None
    reader: Any = None
    looks_ahead: bool = False
    handed: int = 0
    ended: bool = False
    finished: bool = False
    before: tuple[torch.Tensor, torch.Generator | None, torch.Tensor | None] | None = None

    def take(self, read: Read) -> None:
        """Note that a batch of an iterable data set is given out."""
        self.last_reader = read.worker
        if read.place is not None:
            self.places[read.worker] = read.place

    def shelter(self, generator: torch.Generator | None) -> None:
        """Remember the states of PyTorch's generator and of the given one."""
        self.before = torch.get_rng_state(), generator, None if generator is None else generator.get_state()

    def go_back(self) -> None:
        """Restore what `shelter` remembered, once."""
        if self.before is not None:
            state, generator, own = self.before
            self.before = None
            torch.set_rng_state(state)
            if generator is not None and own is not None:
                generator.set_state(own)


class Order:
    """The order of a loader, shared with the loaders that `skip_first_batches` makes of it.

    Attributes:
        running: The pass that has begun and not ended.
        resumed: The pass that the next one goes on with, as a checkpoint says.
        workers_are_seeded: Whether workers that persist have drawn their seed.
    """

    def __init__(self) -> None:
        self.running: Epoch | None = None
        self.resumed: Resumed | None = None
        self.workers_are_seeded = False

    def end(self, epoch: Epoch) -> None:
        """Note that a pass has ended."""
        if self.running is epoch:
            self.running = None

    @contextmanager
    def drawing(
        self, epoch: Epoch, sampler: Any, generator: torch.Generator | None, *, from_host: bool
    ) -> Iterator[None]:
        """Remember the states that the order is drawn from in the block, or draw it again from those resumed.

        The generators of the process go on afterwards as if nothing had been drawn, if the order is resumed.
        """
        resumed, self.resumed = self.resumed, None
        counter = epoch_counter(sampler)
        number = None if counter is None else counter.epoch
        if resumed is None:
            epoch.beginning = Beginning(
                None if generator is None else generator.get_state(),
                host_rng_states() if from_host else None,
                number,
            )
            yield
            return
        drawn = resumed.beginning
        epoch.beginning = Beginning(drawn.generator, drawn.host, number)
        holder = generator_holder(sampler) if generator is not None and drawn.generator is None else None
        if generator is not None and drawn.generator is not None:
            generator.set_state(drawn.generator)
        elif holder is not None:  # saved by one process, whose order came from PyTorch's own generator
            holder.generator = None
        here = host_rng_states()
        if drawn.host is not None:
            set_host_rng_states(drawn.host)
        try:
            yield
        finally:
            set_host_rng_states(here)
            if holder is not None:
                holder.generator = generator


class RememberedSampler:
    """What a loader takes its indices from: a sampler whose order is remembered, and repeated if resumed."""

    def __init__(self, sampler: Any, order: Order, generator: torch.Generator | None) -> None:
        self.sampler = sampler
        self.order = order
        self.generator = generator

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        return self._items(self.order.running or Epoch())

    def _items(self, epoch: Epoch) -> Iterator[Any]:
        epoch.go_back()
        with self.order.drawing(epoch, self.sampler, self.generator, from_host=draws_from_host(self.sampler)):
            iterator = share_from(self.sampler, epoch.start)
            following = next(iterator, _END)
        if epoch.looks_ahead:
            while following is not _END:
                current, following = following, next(iterator, _END)
                epoch.handed += 1
                epoch.ended = following is _END
                yield current
        elif following is not _END:
            yield following
            yield from iterator


def share_from(sampler: Any, start: Start) -> Iterator[Any]:
    """Yield what a loader's sampler, or its share of a user's, gives behind a place in the order."""
    if start is BEGINNING:
        return iter(sampler)
    if isinstance(sampler, SHARES):
        return sampler.iterate(start)
    return batches_from(sampler, start)


def share_length(sampler: Any, start: Start) -> int:
    """Return how much `share_from` gives."""
    if isinstance(sampler, SHARES):
        return sampler.length_from(start)
    return count_from(sampler, start)


def generator_holder(sampler: Any) -> Any:
    """Return the sampler, of those inside one another, that has a generator; `None` if none has."""
    return next((holder for holder in chain(sampler) if hasattr(holder, "generator")), None)


def epoch_counter(sampler: Any) -> Any:
    """Return the sampler, of those inside one another, that counts epochs; `None` if none does."""
    return next((holder for holder in chain(sampler) if hasattr(holder, "epoch")), None)


def draws_from_host(sampler: Any) -> bool:
    """Whether the order may depend on the generators of the process."""
    if not length_is_exact(sampler):
        return True  # a user's own sampler
    *_, innermost = chain(sampler)
    sequential = isinstance(innermost, (SequentialSampler, list, tuple, range))
    return not sequential and getattr(innermost, "generator", None) is None


def share_order(
    sampler: Any, processes: int, seedable: bool, data_seed: int | None
) -> tuple[Any, torch.Generator | None]:
    """Make a sampler draw the same order on every process.

    Args:
        sampler: The sampler, or batch sampler, of a loader.
        processes: Number of processes that draw from it.
        seedable: Whether shuffling should depend on seed and epoch alone.
        data_seed: That seed.

    Returns:
        The sampler to use, and the generator to synchronize.

    Raises:
        ConfigurationError: if the sampler gives only the share of one process already.
    """
    outer = None
    for holder in list(chain(sampler)):
        if processes > 1 and isinstance(holder, DistributedSampler) and holder.num_replicas > 1:
            raise ConfigurationError(
                "this loader has been shared out over processes already",
                found=f"a DistributedSampler with num_replicas={holder.num_replicas}",
                reason="each process would get only its share of a share, and samples would be left out",
                hint="leave the DistributedSampler out, or give the plain sampler: prepare() shares it out",
            )
        if seedable and isinstance(holder, RandomSampler) and not isinstance(holder, SeedableRandomSampler):
            holder = SeedableRandomSampler(
                holder.data_source,
                replacement=holder.replacement,
                num_samples=holder._num_samples,
                generator=holder.generator,
                data_seed=data_seed,
            )
            if outer is None:
                sampler = holder
            else:
                outer.sampler = holder
        if isinstance(holder, SeedableRandomSampler):
            holder.initial_seed = _same_everywhere(holder.initial_seed, processes)
        outer = holder
    generators = [shared_generator(holder, processes) for holder in chain(sampler)]
    return sampler, next((generator for generator in generators if generator is not None), None)


def shared_generator(holder: Any, processes: int) -> torch.Generator | None:
    """Return the generator of a sampler or data set, in the same state on every process.

    With several processes one that could have a generator is given one; in one process, it goes on drawing from
    PyTorch's own.
    """
    if not hasattr(holder, "generator"):
        return None
    if holder.generator is None and processes > 1:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        holder.generator = torch.Generator().manual_seed(_same_everywhere(seed, processes))
    elif isinstance(holder.generator, torch.Generator) and processes > 1:
        holder.generator.set_state(_same_everywhere(holder.generator.get_state(), processes))
    return holder.generator if isinstance(holder.generator, torch.Generator) else None


def _same_everywhere(value: Any, processes: int) -> Any:
    """Return the main process's value, if all processes of the job take part."""
    runtime = Runtime.current
    if processes == 1 or runtime is None or runtime.topology.world_size != processes:
        return value
    return exchange.broadcast_object_list([value])[0]
