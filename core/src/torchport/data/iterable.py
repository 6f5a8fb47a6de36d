"""The shares of processes in an iterable data set, and where each of its readers stands."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker

from torchport.data.samplers import EVERY
from torchport.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Place:
    """Where one reader (the process itself, or one of its workers) stands in an iterable data set with a state.

    Attributes:
        dataset: What the data set's `state_dict` returned, pickled.
        ended: Whether it has come to its end.
        count: Samples that it has given, repeated ones included.
    """

    dataset: bytes
    ended: bool
    count: int


class LastRound(NamedTuple):
    """A sample of a round that was filled up, and how many samples of that round are real."""

    sample: Any
    real: int


class Filler(NamedTuple):
    """A sample that only fills up a round, where one process reads for all."""

    sample: Any


class Read(NamedTuple):
    """A batch on its way out of a worker.

    Attributes:
        batch: The batch.
        real: How many samples are real: of its round or, where one process reads for all, of this batch; -1 if all.
        worker: Number of the reader.
        place: Where the reader stands behind this batch, if the data set has a state.
    """

    batch: Any
    real: int
    worker: int
    place: Any


def has_state(dataset: Any) -> bool:
    """Whether a data set can say where it stands, and go there."""
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


class IterableDatasetShard(IterableDataset[Any]):
    """Takes turns over an iterable data set: in each round, process `r` takes the `r`-th batch of samples.

    Every process iterates over the whole data set, so its order must be the same on all of them; or one process
    reads for all (`process_index=EVERY`). A loader's workers each take turns over what the data set gives in that
    worker, so a set that divides its samples over workers (`torch.utils.data.get_worker_info`) gives each of them
    once; one that does not, repeats them, as it does without sharing, and a warning says so.

    Args:
        dataset: The data set.
        batch_size: Samples per batch (of all processes together if `split_batches`).
        drop_last: Whether to leave out the last round if it is not full.
        num_processes: Number of processes.
        process_index: Index of this process; `EVERY` gives the shares of all, one after the other.
        split_batches: Whether `batch_size` is that of all processes together.
        even_batches: Whether to fill up the last round with samples from the beginning.
        mark: Whether samples of a round that was filled up come as `LastRound`, or those that fill it up as `Filler`
            where one process reads for all.
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
        mark: bool = False,
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
        self.mark = mark
        self.remainder = -1
        self.places: dict[int, Place] | None = None
        self.ended = False
        self.count = 0

    @property
    def total_length(self) -> int:
        """Number of samples of the whole data set, where it knows."""
        return len(self.dataset)

    @property
    def share(self) -> int:
        """Samples of one process in a round."""
        return max(1, self.batch_size // self.num_processes) if self.split_batches else self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, where the data set takes one."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        share = self.share
        rounds, left = divmod(len(self.dataset), share * self.num_processes)
        if left and self.even_batches and not self.drop_last:
            rounds, left = rounds + 1, 0
        if self.process_index == EVERY:
            return rounds * share * self.num_processes + (0 if self.drop_last else left)
        own = 0 if self.drop_last else min(share, max(0, left - share * self.process_index))
        return rounds * share + own

    def place(self) -> Place:
        """Return where this reader stands."""
        return Place(pickle.dumps(self.dataset.state_dict()), self.ended, self.count)

    def __iter__(self) -> Iterator[Any]:
        places, self.places = self.places, None  # taken once: the next epoch begins at the beginning
        place = None if places is None else places.get(reader_number())
        self.remainder, self.ended, self.count = -1, False, 0
        first: list[Any] = []
        source: Iterable[Any] = self.dataset
        if place is not None:
            if self._fills:
                first = list(itertools.islice(iter(self.dataset), self._turn[0]))
            self.ended, self.count = place.ended, place.count
            self.dataset.load_state_dict(pickle.loads(place.dataset))
            source = () if place.ended else self.dataset
        return self._every(source, first) if self.process_index == EVERY else self._turns(source, first)

    @property
    def _turn(self) -> tuple[int, int]:
        """How many samples are read for a round, and where among them this process's begin."""
        return self.share * self.num_processes, self.share * self.process_index

    @property
    def _fills(self) -> bool:
        return self.even_batches and not self.drop_last and self.num_processes > 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _every(self, source: Iterable[Any], first: list[Any]) -> Iterator[Any]:
        """Give every sample at once, so that a reader never stands ahead of what it gave."""
        whole = self.share * self.num_processes
        kept = whole if self._fills else 0
        for sample in source:
            if len(first) < kept:
                first.append(sample)
            self.count += 1
            yield sample
        self.ended = True
        for sample in fillers(first, -self.count % whole if first else 0):
            self.count += 1
            yield Filler(sample) if self.mark else sample

    def _turns(self, source: Iterable[Any], first: list[Any]) -> Iterator[Any]:
        """Give the samples of this process when a round has been read."""
        share, (whole, start) = self.share, self._turn
        pending: list[Any] = []
        for sample in source:
            pending.append(sample)
            if len(pending) == whole:
                first = first or pending
                self.count += whole
                yield from pending[start : start + share]
                pending = []
        self.ended = True
        if pending and not self.drop_last:
            if self.even_batches:
                self.remainder = len(pending)
                pending += fillers(first or pending, whole - len(pending))
                if self.mark:
                    pending = [LastRound(sample, self.remainder) for sample in pending]
            yield from pending[start : start + share]


def fillers(beginning: list[Any], number: int) -> list[Any]:
    """Return samples from the beginning, over and over, until there are `number`."""
    return (beginning * (number // len(beginning) + 1))[:number] if number else []


class ReadCollate:
    """Makes batches of what an `IterableDatasetShard` gives, and says where its reader stands.

    Args:
        shard: The data set; in a worker, its copy there is asked instead.
        collate: What makes a batch of samples.
        batched: Whether there are batches, or single samples.
        keeps_place: Whether the data set has a state.
    """

    def __init__(
        self, shard: IterableDatasetShard, collate: Callable[[Any], Any], batched: bool, keeps_place: bool
    ) -> None:
        self.shard = shard
        self.collate = collate
        self.batched = batched
        self.keeps_place = keeps_place

    def __call__(self, samples: Any) -> Read:
        """Make a batch."""
        info = get_worker_info()
        real = -1
        if self.batched:
            if type(samples[0]) is LastRound:
                real, samples = samples[0].real, [marked.sample for marked in samples]
            elif type(samples[-1]) is Filler:
                real = sum(type(sample) is not Filler for sample in samples)
                samples = [s.sample if type(s) is Filler else s for s in samples]
        elif type(samples) is Filler:
            real, samples = 0, samples.sample
        shard: Any = self.shard if info is None else info.dataset
        place = shard.place() if self.keeps_place else None
        return Read(self.collate(samples), real, reader_number(), place)


class ReaderInfo:
    """What `get_worker_info` returns in a worker that goes by another number, or that is watched.

    Args:
        info: What PyTorch knows about the worker.
        number: The number it goes by.
    """

    def __init__(self, info: Any, number: int) -> None:
        self.info = info
        self.number = number
        self.asked = False

    @property
    def id(self) -> int:
        """The number it goes by."""
        self.asked = True
        return self.number

    def __getattr__(self, name: str) -> Any:
        if name == "info":
            raise AttributeError(name)
        return getattr(self.info, name)


def reader_number() -> int:
    """Return the number of the worker that this runs in; 0 outside of workers."""
    info: Any = get_worker_info()
    if info is None:
        return 0
    return int(info.number if isinstance(info, ReaderInfo) else info.id)


class AsWorker:
    """Lets the workers of a loader go on as those of an interrupted one, the next of which comes first.

    Args:
        first: Number of the worker that gives the next batch.
        initialize: The user's `worker_init_fn`.
    """

    def __init__(self, first: int, initialize: Callable[[int], None] | None) -> None:
        self.first = first
        self.initialize = initialize

    def __call__(self, worker_id: int) -> None:
        """Take the number of another worker."""
        info: Any = get_worker_info()
        number = (worker_id + self.first) % info.num_workers
        worker._worker_info = ReaderInfo(info, number)  # type: ignore[assignment]
        if self.initialize is not None:
            self.initialize(number)


def watch_worker(worker_id: int) -> None:
    """Note, from now on, whether the first worker's data set asks which worker it is in."""
    if worker_id == 0:
        worker._worker_info = ReaderInfo(get_worker_info(), worker_id)  # type: ignore[assignment]


class WatchedCollate:
    """Makes batches; with the first one in a worker that is watched, warns if its data set ignores the workers.

    Args:
        collate: What makes a batch of samples.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.looked = False

    def __call__(self, samples: Any) -> Any:
        """Make a batch."""
        info: Any = get_worker_info()
        if not self.looked and isinstance(info, ReaderInfo) and not info.asked:
            self._warn(info.dataset, info.num_workers)
        self.looked = True
        return self.collate(samples)

    @staticmethod
    def _warn(dataset: Any, workers: int) -> None:
        name = type(dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset).__name__
        warnings.warn(
            f"{name} does not ask which worker it is in, so each of its {workers} workers gives all of its samples:"
            f" an epoch has each of them {workers} times. Let its __iter__ give every num_workers-th sample, from"
            " torch.utils.data.get_worker_info(), or take num_workers=0 or 1.",
            stacklevel=2,
        )
