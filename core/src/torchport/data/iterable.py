"""The share of one process in an iterable data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from torchport.errors import ConfigurationError


class IterableDatasetShard(IterableDataset[Any]):
    """Takes turns over an iterable data set: in each round, process `r` takes the `r`-th batch of samples.

    Every process iterates over the whole data set, so its order must be the same on all of them. A loader's
    workers each take turns over what the data set gives in that worker, so a set that divides its samples over
    workers (`torch.utils.data.get_worker_info`) gives each of them once; one that does not, repeats them, as it
    does without sharing.

    Args:
        dataset: The data set.
        batch_size: Samples per batch (of all processes together if `split_batches`).
        drop_last: Whether to leave out the last round if it is not full.
        num_processes: Number of processes.
        process_index: Index of this process.
        split_batches: Whether `batch_size` is that of all processes together.
        even_batches: Whether to fill up the last round with samples from the beginning.
        mark_last_round: Whether samples of a round that was filled up come as `LastRound`, which carries the
            number of real ones out of a worker.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
        mark_last_round: bool = False,
    ) -> None:
        if split_batches and batch_size > 1 and batch_size % num_processes:
            raise ConfigurationError(
                f"split_batches cuts each batch into {num_processes} equal parts",
                found=f"batches of {batch_size}",
                hint=f"a batch size that is a multiple of {num_processes}",
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.mark_last_round = mark_last_round
        self.remainder = -1

    @property
    def total_length(self) -> int:
        """Number of samples of the whole data set, where it knows."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, where the data set takes one."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        share = self._share
        whole = share * self.num_processes
        rounds, left = divmod(len(self.dataset), whole)
        if not left or self.drop_last:
            return rounds * share
        return (rounds + 1) * share

    @property
    def _share(self) -> int:
        return self.batch_size // self.num_processes if self.split_batches else self.batch_size

    def __iter__(self) -> Iterator[Any]:
        self.remainder = -1
        share = self._share
        whole, start = share * self.num_processes, share * self.process_index
        first: list[Any] = []
        pending: list[Any] = []
        source: Iterable[Any] = self.dataset
        for sample in source:
            pending.append(sample)
            if len(pending) == whole:
                first = first or pending
                yield from pending[start : start + share]
                pending = []
        if pending and not self.drop_last:
            if self.even_batches:
                self.remainder = len(pending)
                first = first or list(pending)
                while len(pending) < whole:
                    pending += first[: whole - len(pending)]
                if self.mark_last_round:
                    pending = [LastRound(sample, self.remainder) for sample in pending]
            yield from pending[start : start + share]


class LastRound(NamedTuple):
    """A sample of a round that was filled up, and how many samples of that round are real."""

    sample: Any
    real: int


def collate_round(samples: list[Any], collate: Callable[[list[Any]], Any]) -> tuple[int, Any]:
    """Make a batch, and say how many samples of its round, over all processes, are real; -1 if all are."""
    if isinstance(samples[0], LastRound):
        return samples[0].real, collate([marked.sample for marked in samples])
    return -1, collate(samples)
