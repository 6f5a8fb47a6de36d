"""Samplers that share batches out over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler

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
        yield from super().__iter__()
        self.epoch += 1

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
        if self.batch_size is None and even_batches:
            raise ConfigurationError(
                "even_batches fills up the last batches to the size of the others",
                found="a batch sampler without a batch_size",
                hint="DataLoaderConfiguration(even_batches=False), or give the sampler a batch_size",
            )

    @property
    def total_length(self) -> int:
        """Number of whole batches."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        total = len(self.batch_sampler)
        if self.split_batches:
            return total
        rounds, left = divmod(total, self.num_processes)
        if left == 0 or self.drop_last:
            return rounds
        return rounds + 1 if self.even_batches else rounds + (self.process_index < left)

    def __iter__(self) -> Iterator[list[Any]]:
        self.remainder = -1
        return self._parts() if self.split_batches else self._turns()

    def _parts(self) -> Iterator[list[Any]]:
        """Cut each batch into parts."""
        first: list[Any] = []
        for batch in self.batch_sampler:
            first = first or list(batch)
            whole = self.batch_size or len(batch)
            if len(batch) < whole:
                if self.drop_last:
                    return
                if self.even_batches:
                    self.remainder = len(batch)
                    batch = _fill(list(batch), first, whole)
            part = (
                -(-len(batch) // self.num_processes) if not self.even_batches else whole // self.num_processes
            )
            share = batch[part * self.process_index : part * (self.process_index + 1)]
            if share:
                yield share

    def _turns(self) -> Iterator[list[Any]]:
        """Give whole batches to processes in turn, holding back a round until it is known to be full."""
        size = self.batch_size
        seen: list[Any] = []  # the beginning, to fill up the end with
        turn: list[list[Any]] = []
        for batch in self.batch_sampler:
            batch = list(batch)
            if size is not None and len(seen) < size * self.num_processes:
                seen += batch
            turn.append(batch)
            if len(turn) == self.num_processes and (size is None or len(batch) == size):
                yield turn[self.process_index]
                turn = []
        if not turn or self.drop_last:
            return
        if not self.even_batches:
            if self.process_index < len(turn):
                yield turn[self.process_index]
            return
        assert size is not None
        samples = [sample for batch in turn for sample in batch]
        self.remainder = len(samples)
        samples = _fill(samples, seen, size * self.num_processes)
        yield samples[size * self.process_index : size * (self.process_index + 1)]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to samplers that take one."""
        for sampler in (self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _fill(samples: list[Any], beginning: list[Any], size: int) -> list[Any]:
    """Append samples from the beginning, over and over, until there are `size`."""
    missing = size - len(samples)
    if missing <= 0:
        return samples
    return samples + (beginning * (missing // len(beginning) + 1))[:missing]


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

    def __iter__(self) -> Iterator[list[Any]]:
        for index, batch in enumerate(self.batch_sampler):
            if index >= self.skip_batches:
                yield batch

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)
