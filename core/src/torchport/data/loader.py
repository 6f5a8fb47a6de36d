"""Loaders that give each process its share of a data set, on its device."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchport.data.iterable import AsWorker, IterableDatasetShard, Read, has_state, watch_worker
from torchport.data.order import Epoch, Order, RememberedSampler, epoch_counter, share_length
from torchport.data.position import load_order, save_order, skip_rounds, tell_what_is_left_out
from torchport.data.prefetch import ReadAhead
from torchport.data.samplers import (
    BEGINNING,
    BatchSamplerShard,
    Start,
    WholeBatchShard,
    length_is_exact,
    set_epoch,
)
from torchport.ops.pytree import find_batch_size, send_to_device
from torchport.state import GradientState
from torchport.training.random import synchronize_rng_states


class DataLoaderShard(DataLoader[Any]):
    """The share of one process in a loader.

    Attributes:
        end_of_dataloader: Whether the batch given last is the last one.
        batches_left: Number of batches still to come; `None` while the number is not known.
        real_samples: For each process, how many samples of the current round are not repeated ones; `None` where
            all are real, or `remainder` tells.
        tells_what_is_left_out: Whether a warning says so where a pass goes on amid an epoch.

    Args:
        dataset: The data set.
        device: Where batches are moved to; `None` leaves them where they are.
        rng_types: Generators to synchronize over processes at the beginning of each epoch.
        synchronized_generator: The generator that `"generator"` among them means.
        skip_batches: Batches left out at the beginning of every epoch.
        non_blocking: Whether copies to the device are asynchronous.
        order: The order of a loader that this one goes on with.
        source: A loader with an `__iter__` of its own, which gives the batches.
        step: Batches of the unshared loader that a round, one batch of each process, takes.
        from_beginning: Whether `skip_batches` is counted from the beginning of an epoch that is gone on with, too.
        prefetch: Copies the next batch to the device while the current one is computed on.
        **kwargs: As for `torch.utils.data.DataLoader`.
    """

    tells_what_is_left_out = True

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: Sequence[str] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        non_blocking: bool = False,
        order: Order | None = None,
        source: DataLoader[Any] | None = None,
        step: int = 1,
        from_beginning: bool = False,
        prefetch: ReadAhead | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.device = device
        self.rng_types = tuple(rng_types or ())
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.non_blocking = non_blocking
        self.order = order or Order()
        self.source = source
        self.step = step
        self.from_beginning = from_beginning
        self.prefetch = prefetch
        self.gradient_state = GradientState()
        self.end_of_dataloader = False
        self.batches_left: int | None = None
        self.real_samples: tuple[int, ...] | None = None
        self._real = -1
        self._watched = False
        self._place: Callable[[Any], Any] | None = None
        if device is not None and prefetch is None:
            self._place = functools.partial(send_to_device, device=device, non_blocking=non_blocking)

    @property
    def _index_sampler(self) -> Any:
        """Where PyTorch's iterators take indices from."""
        sampler = super()._index_sampler
        if isinstance(self.dataset, IterableDataset):
            return sampler
        return RememberedSampler(sampler, self.order, self.synchronized_generator)

    @property
    def given_sampler(self) -> Any:
        """What gives the indices of each batch, or of each sample where there are no batches."""
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    @property
    def user_dataset(self) -> Any:
        """The user's data set."""
        dataset: Any = self.dataset
        return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset

    @property
    def reads_for(self) -> int:
        """Number of processes for which this one reads."""
        return 1

    @property
    def keeps_place(self) -> bool:
        """Whether the data set is iterable and has a state of its own."""
        return isinstance(self.dataset, IterableDatasetShard) and has_state(self.dataset.dataset)

    @property
    def batches_given(self) -> int:
        """Number of batches of the running epoch that have been given out, since it began or was gone on with."""
        running = self.order.running
        return -1 if running is None else running.given

    @property
    def remainder(self) -> int:
        """Number of samples in the current round that are not repeated; -1 where all are real."""
        return self._real

    @property
    def total_batch_size(self) -> int:
        """Number of samples that all processes together take at a time."""
        if isinstance(self.dataset, IterableDatasetShard):
            return self.dataset.share * self.dataset.num_processes
        sampler = self.given_sampler
        if isinstance(sampler, BatchSamplerShard) and not sampler.split_batches:
            return int(sampler.batch_size or 0) * sampler.num_processes
        if isinstance(sampler, WholeBatchShard):
            return sampler.num_processes
        return int(getattr(sampler, "batch_size", None) or self.batch_size or 1)

    @property
    def total_dataset_length(self) -> int:
        """Number of samples of the whole data set."""
        return len(self.user_dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next, wherever a sampler or the data set takes one.

        Workers that persist hold copies of the data set; if it takes an epoch, they are started anew.
        """
        set_epoch(self.given_sampler, epoch)
        if hasattr(self.user_dataset, "set_epoch"):
            self._iterator = None
        for holder in (self.source, self.dataset):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)  # type: ignore[union-attr]

    def order_state(self) -> dict[str, Any]:
        """Return what the next epoch is drawn from; amid an epoch, where it stands and what it was drawn from.

        Returns:
            Tensors and plain values.
        """
        return save_order(self)

    def load_order_state(self, state: dict[str, Any]) -> None:
        """Go on, with the next pass, from where `order_state` was called."""
        load_order(self, state)

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands: another name of `order_state`."""
        return self.order_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called: another name of `load_order_state`."""
        self.load_order_state(state)

    def __len__(self) -> int:
        length = super().__len__() if self.source is None else len(self.source)
        return max(0, length - self.skip_batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        lend = self.gradient_state.lend
        return self._batches() if lend is None else lend(self, self._batches())

    def _batches(self) -> Iterator[Any]:
        epoch = self._begin()
        if self.source is not None or isinstance(self.dataset, IterableDataset):
            return self._look_ahead(self._read(epoch), epoch)
        batches = self._draw(epoch, looks_ahead=not length_is_exact(self.given_sampler))
        if self.prefetch is not None:
            batches = self.prefetch(batches)
        if epoch.looks_ahead:
            return self._follow(batches, epoch)
        self.batches_left = share_length(self.given_sampler, epoch.start)
        return self._count_down(batches, epoch, self.batches_left)

    def _begin(self) -> Epoch:
        """Begin an epoch, or go on with one."""
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.end_of_dataloader, self.batches_left, self._real, self.real_samples = False, None, -1, None
        resumed = self.order.resumed
        start = Start(self.skip_batches * self.step) if self.skip_batches else BEGINNING
        if resumed is not None and not self.from_beginning:
            start = resumed.start
            if self.tells_what_is_left_out:
                tell_what_is_left_out(self, start)
        epoch = self.order.running = Epoch(start=start, step=self.step)
        return epoch

    def _draw(self, epoch: Epoch, *, looks_ahead: bool) -> Iterator[Any]:
        """Begin to read a data set whose samples are chosen by a sampler."""
        epoch.looks_ahead = looks_ahead
        persistent = self._shelter(epoch)
        batches = super().__iter__()  # draws a seed for workers; the interrupted run had drawn it before
        epoch.go_back()
        self.order.workers_are_seeded = persistent
        return batches

    def _shelter(self, epoch: Epoch) -> bool:
        """Protect generators from the seed of workers, if it had been drawn before; return whether they persist."""
        persistent = self.num_workers > 0 and self.persistent_workers
        drawn = self.order.resumed is not None or (persistent and self.order.workers_are_seeded)
        if drawn and self._iterator is None:
            epoch.shelter(self.generator)
        return persistent

    def _read(self, epoch: Epoch) -> Iterator[Any]:
        """Begin to read a data set, or a loader, that chooses its samples itself."""
        resumed = self.order.resumed
        places = None if resumed is None or not self.keeps_place else resumed
        if places is not None and epoch.start != places.start:
            places = None  # other batches than those of the checkpoint are asked for
        if self.keeps_place:
            epoch.dataset = pickle.dumps(self.user_dataset.state_dict())
        rounds = skip_rounds(self, epoch.start) * self.reads_for if places is None else 0
        persistent = self.num_workers > 0 and self.persistent_workers
        if resumed is None and persistent and self.order.workers_are_seeded:
            self._shelter(epoch)
        with self.order.drawing(epoch, None, self.synchronized_generator, from_host=True):
            if places is not None:
                batches = self._go_on(places.places, places.next_reader)
                epoch.places = dict(places.places)
                epoch.last_reader = places.next_reader - 1
            else:
                batches = self._start()
            for _ in range(rounds if resumed is not None else 0):
                next(batches, None)
        for _ in range(0 if resumed is not None else rounds):
            next(batches, None)
        epoch.go_back()
        self.order.workers_are_seeded = persistent
        return batches if self.prefetch is None else self.prefetch(batches)

    def _start(self) -> Iterator[Any]:
        """Start reading at the beginning."""
        if self.source is not None:
            return iter(self.source)
        if self._watched or self.num_workers < 2 or self.worker_init_fn is not None:
            return super().__iter__()
        self._watched = True
        return self._with_workers(watch_worker)

    def _go_on(self, places: dict[int, Any], next_reader: int) -> Iterator[Any]:
        """Start reading where readers stood."""
        shard: Any = self.dataset
        self._iterator = None
        shard.places = places
        try:
            if self.num_workers == 0:
                return super().__iter__()
            return self._with_workers(AsWorker(next_reader, self.worker_init_fn))
        finally:
            shard.places = None

    def _with_workers(self, initialize: Callable[[int], None]) -> Iterator[Any]:
        """Start workers that are initialized in another way than the user's."""
        users, self.worker_init_fn = self.worker_init_fn, initialize
        try:
            return super().__iter__()
        finally:
            self.worker_init_fn = users

    def _count_down(self, batches: Iterator[Any], epoch: Epoch, left: int) -> Iterator[Any]:
        """Give out batches of a loader whose length is known; nothing is read before it is asked for."""
        place, gradients = self._place, self.gradient_state
        own = vars(self)  # an attribute of a DataLoader is set by Python code that looks for reserved names
        gradients._add_dataloader(self)
        try:
            for batch in batches:
                left -= 1
                own["batches_left"] = left
                epoch.given += 1
                if left == 0:
                    self._end(epoch, batch)
                gradients.active_dataloader = self
                yield batch if place is None else place(batch)
        finally:
            self._close(epoch)

    def _follow(self, batches: Iterator[Any], epoch: Epoch) -> Iterator[Any]:
        """Give out batches of a loader whose sampler, being one ahead of them, knows which is the last."""
        place, gradients = self._place, self.gradient_state
        gradients._add_dataloader(self)
        try:
            for batch in batches:
                epoch.given += 1
                if epoch.ended:
                    self.batches_left = epoch.handed - epoch.given
                    if epoch.given == epoch.handed:
                        self._end(epoch, batch)
                gradients.active_dataloader = self
                yield batch if place is None else place(batch)
        finally:
            self._close(epoch)

    def _look_ahead(self, batches: Iterator[Any], epoch: Epoch) -> Iterator[Any]:
        """Give out batches of a loader without a sampler, reading one ahead to know the last."""
        place, gradients = self._place, self.gradient_state
        gradients._add_dataloader(self)
        try:
            for current in batches:
                for following in batches:
                    batch = self._take(current, epoch)
                    gradients.active_dataloader = self
                    yield batch if place is None else place(batch)
                    current = following
                self.end_of_dataloader, self.batches_left = True, 0
                batch = self._take(current, epoch)
                self.order.end(epoch)
                gradients.active_dataloader = self
                yield batch if place is None else place(batch)
        finally:
            self._close(epoch)

    def _take(self, read: Any, epoch: Epoch) -> Any:
        """Note that a batch is given out, and return it."""
        epoch.given += 1
        if not isinstance(read, Read):
            return read
        self._real = read.real
        epoch.take(read)
        return read.batch

    def _end(self, epoch: Epoch, batch: Any) -> None:
        """Note that this batch is the last."""
        self.end_of_dataloader, self.batches_left = True, 0
        epoch.finished = True
        sampler = self.given_sampler
        real = int(getattr(sampler, "remainder", -1))
        if real > 0 and isinstance(sampler, WholeBatchShard):
            real *= find_batch_size(batch) or 1
        self._real = real

    def _close(self, epoch: Epoch) -> None:
        """Note that an epoch has ended, or was broken off."""
        self.order.end(epoch)
        self.gradient_state._remove_dataloader(self)


__all__ = ["DataLoaderShard", "epoch_counter"]
