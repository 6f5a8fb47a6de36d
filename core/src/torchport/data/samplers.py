"""Samplers that share batches out over processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torchport.errors import ConfigurationError

EVERY = -1
"""Stands for all processes, where one reads for all."""


@dataclass(frozen=True, slots=True)
class Start:
    """A place in the order of an epoch, which all processes share.

    Attributes:
        batches: Batches before it, as the unshared sampler gives them.
        samples: Samples before it in the batch that follows those: batches begin anew behind them.
    """

    batches: int = 0
    samples: int = 0


BEGINNING = Start()


class SeedableRandomSampler(RandomSampler):
    """A random sampler whose order depends on a seed and the epoch alone.

    Args:
        *args: As for `torch.utils.data.RandomSampler`.
        data_seed: The seed; by default PyTorch's initial seed.
        **kwargs: As for `torch.utils.data.RandomSampler`.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.random.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed((self.initial_seed + self.epoch) % 2**63)
        self.epoch += 1  # now, so that an epoch that is broken off counts too
        yield from super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """The share of one process in the batches of a batch sampler.

    Without `split_batches`, process `r` of `N` gets batches `r`, `r + N`, `r + 2N`, …; with it, every batch is
    cut into `N` parts. Samples that are missing for a full last round are taken from the beginning if
    `even_batches`; `remainder` then tells how many samples of that round are not repeated.

    Args:
        batch_sampler: The sampler of whole batches.
        num_processes: Number of processes.
        process_index: Index of this process; `EVERY` gives the batches of all, one after the other in each round.
        split_batches: Whether each batch is cut into parts, rather than given whole to one process.
        even_batches: Whether to fill up the last round from the beginning.

    Raises:
        ConfigurationError: if a batch cannot be cut into equal parts, or cannot be filled up because batches
            have no fixed size.
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler: Any = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))
        self.remainder = -1
        if split_batches and self.batch_size is not None and self.batch_size % num_processes:
            raise ConfigurationError(
                f"split_batches cuts each batch into {num_processes} equal parts",
                found=f"batches of {self.batch_size}",
                hint=f"a batch size that is a multiple of {num_processes}, or split_batches=False",
            )
        self._check_size()

    def _check_size(self) -> None:
        if self.batch_size is None and self.even_batches:
            raise ConfigurationError(
                "even_batches fills up the last batches to the size of the others",
                found="a batch sampler without a batch_size",
                hint="DataLoaderConfiguration(even_batches=False), or give the sampler a batch_size",
            )

    @property
    def total_length(self) -> int:
        """Number of whole batches."""
        return len(self.batch_sampler)

    @property
    def length_is_exact(self) -> bool:
        """Whether `len` is the number of batches, rather than what a user's sampler claims."""
        if self.split_batches and not takes_batches_of_a_sampler(self.batch_sampler):
            return False  # parts of a batch of unknown size may be empty
        return length_is_exact(self.batch_sampler)

    def __len__(self) -> int:
        return self.length_from(BEGINNING)

    def length_from(self, start: Start) -> int:
        """Return the number of batches given behind a place in the order."""
        return sum(self._length(start, rank) for rank in _ranks(self))

    def _length(self, start: Start, rank: int) -> int:
        total = count_from(self.batch_sampler, start)
        if self.split_batches:
            return total - self._misses_last_part(total, start, rank)
        rounds, left = divmod(total, self.num_processes)
        if left == 0 or self.drop_last:
            return rounds
        return rounds + 1 if self.even_batches else rounds + (rank < left)

    def _misses_last_part(self, total: int, start: Start, rank: int) -> bool:
        """Whether the last of `total` batches is too short to give a process a part."""
        if self.even_batches or self.drop_last or total < 1 or self.batch_size is None:
            return False
        if not takes_batches_of_a_sampler(self.batch_sampler):
            return False
        before = start.batches * self.batch_size + start.samples
        last = len(self.batch_sampler.sampler) - before - (total - 1) * self.batch_size
        return bool(-(-last // self.num_processes) * rank >= last)

    def __iter__(self) -> Iterator[list[Any]]:
        return self.iterate(BEGINNING)

    def iterate(self, start: Start) -> Iterator[list[Any]]:
        """Yield the batches behind a place in the order; what is before it is drawn and not given."""
        self._check_size()  # `even_batches` may have been overridden meanwhile
        self.remainder, ranks = -1, _ranks(self)
        return self._parts(start, ranks) if self.split_batches else self._turns(start, ranks)

    def _parts(self, start: Start, ranks: Sequence[int]) -> Iterator[list[Any]]:
        """Cut each batch into parts."""
        seen: list[Any] = []
        for batch in batches_from(self.batch_sampler, start, seen.extend):
            seen = seen or list(batch)
            whole = self.batch_size or len(batch)
            self.remainder = -1
            if len(batch) < whole and self.even_batches:
                self.remainder = len(batch)
                batch = _fill(list(batch), seen, whole)
            part = -(-len(batch) // self.num_processes)
            for rank in ranks:
                share = batch[part * rank : part * (rank + 1)]
                if share:
                    yield share

    def _turns(self, start: Start, ranks: Sequence[int]) -> Iterator[list[Any]]:
        """Give whole batches to processes in turn, holding back a turn until the next one begins."""
        size = self.batch_size
        seen: list[Any] = []  # the beginning, to fill up the end with
        held: list[list[Any]] = []  # the last complete turn
        turn: list[list[Any]] = []
        for batch in batches_from(self.batch_sampler, start, seen.extend):
            batch = list(batch)
            if size is not None and len(seen) < size * self.num_processes:
                seen += batch
            if held:
                for rank in ranks:
                    yield held[rank]
                held = []
            turn.append(batch)
            if len(turn) == self.num_processes:
                held, turn = turn, []
        if not held and (not turn or self.drop_last):
            return
        last = held or turn
        if not self.even_batches or (held and (self.drop_last or min(map(len, last)) >= size)):
            yield from (last[rank] for rank in ranks if rank < len(last))
            return
        samples = [sample for batch in last for sample in batch]
        share = max(size, -(-len(samples) // self.num_processes))
        if len(samples) < share * self.num_processes:
            self.remainder = len(samples)
        samples = _fill(samples, seen, share * self.num_processes)
        for rank in ranks:
            yield samples[share * rank : share * (rank + 1)]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to every sampler inside that takes one."""
        set_epoch(self.batch_sampler, epoch)


def _fill(samples: list[Any], beginning: list[Any], size: int) -> list[Any]:
    """Append samples from the beginning, over and over, until there are `size`."""
    missing = size - len(samples)
    if missing <= 0:
        return samples
    return samples + (beginning * (missing // len(beginning) + 1))[:missing]


class WholeBatchShard(Sampler[Any]):
    """The share of one process in the indices of a data set that gives a whole batch for each.

    Args:
        sampler: The sampler of indices.
        num_processes: Number of processes.
        process_index: Index of this process; `EVERY` gives the batches of all, one after the other in each round.
        even_batches: Whether processes that would get nothing in the last round repeat its first batch;
            `remainder` then tells how many batches of that round are not repeated.
    """

    def __init__(self, sampler: Any, num_processes: int, process_index: int, even_batches: bool) -> None:
        self.sampler: Any = sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.even_batches = even_batches
        self.remainder = -1

    @property
    def length_is_exact(self) -> bool:
        """Whether `len` is the number of batches, rather than what a user's sampler claims."""
        return length_is_exact(self.sampler)

    def __len__(self) -> int:
        return self.length_from(BEGINNING)

    def length_from(self, start: Start) -> int:
        """Return the number of batches given behind a place in the order."""
        rounds, left = divmod(count_from(self.sampler, start), self.num_processes)
        return sum(rounds + (rank < left or (self.even_batches and left > 0)) for rank in _ranks(self))

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(BEGINNING)

    def iterate(self, start: Start) -> Iterator[Any]:
        """Yield the batches behind a place in the order; what is before it is drawn and not given."""
        self.remainder, ranks = -1, _ranks(self)
        turn: list[Any] = []
        for index in batches_from(self.sampler, start):
            turn.append(index)
            if len(turn) == self.num_processes:
                yield from (turn[rank] for rank in ranks)
                turn = []
        if not turn:
            return
        self.remainder = len(turn) if self.even_batches else -1
        for rank in ranks:
            if rank < len(turn) or self.even_batches:
                yield turn[rank if rank < len(turn) else 0]


def _ranks(share: Any) -> Sequence[int]:
    """Return the processes whose batches a share gives."""
    return range(share.num_processes) if share.process_index == EVERY else (share.process_index,)


SHARES = (BatchSamplerShard, WholeBatchShard)
"""The samplers that wrap a user's."""

_EXACT = (
    SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler, BatchSampler,
    SeedableRandomSampler,
)  # fmt: skip
"""Samplers that are known to give as many items as they say."""


def length_is_exact(sampler: Any) -> bool:
    """Whether a sampler gives as many items as its `len` says; a user's own may do otherwise."""
    if isinstance(sampler, SHARES):
        return sampler.length_is_exact
    kind = type(sampler)
    if kind in (list, tuple, range):
        return True
    iterate, length = getattr(kind, "__iter__", None), getattr(kind, "__len__", None)
    if not any(iterate is known.__iter__ and length is known.__len__ for known in _EXACT):
        return False
    return length_is_exact(sampler.sampler) if iterate is BatchSampler.__iter__ else True


def takes_batches_of_a_sampler(sampler: Any) -> bool:
    """Whether every batch has the same size but the last, which has what is left of the sampler's samples."""
    kind = type(sampler)
    return getattr(kind, "__iter__", None) is BatchSampler.__iter__ and length_is_exact(sampler)


def batches_from(
    sampler: Any, start: Start, skipped: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """Yield the items of a sampler behind a place in its order.

    Args:
        sampler: A sampler of batches or, with a place of whole items, of anything.
        start: The place. Items before it are drawn and not given.
        skipped: Called with each batch before it.
    """
    source = iter(sampler)
    for item in itertools.islice(source, start.batches):
        if skipped is not None:
            skipped(list(item))
    return _regrouped(source, sampler, start.samples, skipped) if start.samples else source


def _regrouped(
    source: Iterator[Any], sampler: Any, samples: int, skipped: Callable[[list[Any]], Any] | None
) -> Iterator[Any]:
    """Yield batches that begin in the middle of the sampler's."""
    flat = (sample for batch in source for sample in batch)
    before = list(itertools.islice(flat, samples))
    if skipped is not None:
        skipped(before)
    while batch := list(itertools.islice(flat, sampler.batch_size)):
        if len(batch) < sampler.batch_size and sampler.drop_last:
            return
        yield batch


def count_from(sampler: Any, start: Start) -> int:
    """Return the number of items of a sampler behind a place in its order."""
    total = len(sampler)
    if not start.samples:
        return max(0, total - start.batches)
    size = sampler.batch_size
    whole = total * size if sampler.drop_last else len(sampler.sampler)
    left = max(0, whole - start.batches * size - start.samples)
    return int(left // size if sampler.drop_last else -(-left // size))


def chain(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those inside it, outermost first."""
    seen: set[int] = set()
    while sampler is not None and id(sampler) not in seen:
        seen.add(id(sampler))
        yield sampler
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner


def set_epoch(sampler: Any, epoch: int) -> None:
    """Tell the epoch to a sampler and to every one inside it, each once, where it takes one."""
    for holder in chain(sampler):
        if hasattr(holder, "set_epoch") and not isinstance(holder, SHARES):
            holder.set_epoch(epoch)


@contextmanager
def filling_up(loaders: Iterable[Any], even_batches: bool | None) -> Iterator[None]:
    """Override inside the block whether prepared loaders fill up the last round; `None` leaves them as they are."""
    samplers = [
        sampler
        for loader in loaders
        for sampler in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
        if isinstance(sampler, (BatchSamplerShard, WholeBatchShard))
    ]
    before = [sampler.even_batches for sampler in samplers]
    for sampler in samplers if even_batches is not None else ():
        sampler.even_batches = bool(even_batches)
    try:
        yield
    finally:
        for sampler, value in zip(samplers, before, strict=True):
            sampler.even_batches = value
