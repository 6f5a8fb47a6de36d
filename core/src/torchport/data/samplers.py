"""Samplers that share batches out over processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
        process_index: Index of this process.
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
        if self.split_batches and not _takes_batches_of_a_sampler(self.batch_sampler):
            return False  # parts of a batch of unknown size may be empty
        return length_is_exact(self.batch_sampler)

    def __len__(self) -> int:
        total = len(self.batch_sampler)
        if self.split_batches:
            return total - self._misses_last_part(total)
        rounds, left = divmod(total, self.num_processes)
        if left == 0 or self.drop_last:
            return rounds
        return rounds + 1 if self.even_batches else rounds + (self.process_index < left)

    def _misses_last_part(self, total: int) -> bool:
        """Whether the last of `total` batches is too short to give this process a part."""
        if self.even_batches or self.drop_last or not total or self.batch_size is None:
            return False
        if not _takes_batches_of_a_sampler(self.batch_sampler):
            return False
        last = len(self.batch_sampler.sampler) - (total - 1) * self.batch_size
        return bool(-(-last // self.num_processes) * self.process_index >= last)

    def __iter__(self) -> Iterator[list[Any]]:
        self._check_size()  # `even_batches` may have been overridden meanwhile
        self.remainder = -1
        return self._parts() if self.split_batches else self._turns()

    def _parts(self) -> Iterator[list[Any]]:
        """Cut each batch into parts."""
        first: list[Any] = []
        for batch in self.batch_sampler:
            first = first or list(batch)
            whole = self.batch_size or len(batch)
            self.remainder = -1
            if len(batch) < whole and self.even_batches:
                self.remainder = len(batch)
                batch = _fill(list(batch), first, whole)
            part = -(-len(batch) // self.num_processes)
            share = batch[part * self.process_index : part * (self.process_index + 1)]
            if share:
                yield share

    def _turns(self) -> Iterator[list[Any]]:
        """Give whole batches to processes in turn, holding back a turn until the next one begins."""
        size = self.batch_size
        seen: list[Any] = []  # the beginning, to fill up the end with
        held: list[list[Any]] = []  # the last complete turn
        turn: list[list[Any]] = []
        for batch in self.batch_sampler:
            batch = list(batch)
            if size is not None and len(seen) < size * self.num_processes:
                seen += batch
            if held:
                yield held[self.process_index]
                held = []
            turn.append(batch)
            if len(turn) == self.num_processes:
                held, turn = turn, []
        if not held and (not turn or self.drop_last):
            return
        last = held or turn
        if not self.even_batches or (held and (self.drop_last or min(map(len, last)) >= size)):
            if self.process_index < len(last):
                yield last[self.process_index]
            return
        samples = [sample for batch in last for sample in batch]
        share = max(size, -(-len(samples) // self.num_processes))
        if len(samples) < share * self.num_processes:
            self.remainder = len(samples)
        samples = _fill(samples, seen, share * self.num_processes)
        yield samples[share * self.process_index : share * (self.process_index + 1)]

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
        process_index: Index of this process.
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
        rounds, left = divmod(len(self.sampler), self.num_processes)
        return rounds + (self.process_index < left or (self.even_batches and left > 0))

    def __iter__(self) -> Iterator[Any]:
        self.remainder = -1
        turn: list[Any] = []
        for index in self.sampler:
            turn.append(index)
            if len(turn) == self.num_processes:
                yield turn[self.process_index]
                turn = []
        if self.process_index < len(turn) or (turn and self.even_batches):
            self.remainder = len(turn) if self.even_batches else -1
            yield turn[self.process_index if self.process_index < len(turn) else 0]


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches.

    Args:
        batch_sampler: The sampler of batches.
        skip_batches: How many to leave out.
    """

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))

    @property
    def remainder(self) -> int:
        """As the wrapped sampler says."""
        return int(getattr(self.batch_sampler, "remainder", -1))

    @property
    def length_is_exact(self) -> bool:
        """Whether `len` is the number of batches, rather than what a user's sampler claims."""
        return length_is_exact(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to every sampler inside that takes one."""
        set_epoch(self.batch_sampler, epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        return itertools.islice(iter(self.batch_sampler), self.skip_batches, None)

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)


SHARES = (BatchSamplerShard, WholeBatchShard, SkipBatchSampler)
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


def _takes_batches_of_a_sampler(sampler: Any) -> bool:
    """Whether every batch has the same size but the last, which has what is left of the sampler's samples."""
    kind = type(sampler)
    return getattr(kind, "__iter__", None) is BatchSampler.__iter__ and length_is_exact(sampler)


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
