"""Loaders that give each process its share of a data set, on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchport.data.iterable import IterableDatasetShard, collate_round
from torchport.data.order import (
    Beginning,
    Epoch,
    Order,
    RememberedSampler,
    epoch_counter,
    share_order,
    shared_generator,
)
from torchport.data.samplers import (
    BatchSamplerShard,
    SkipBatchSampler,
    WholeBatchShard,
    length_is_exact,
    set_epoch,
)
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.ops.pytree import find_batch_size, send_to_device
from torchport.runtime import Runtime
from torchport.state import GradientState
from torchport.training.random import host_rng_states, set_host_rng_states, synchronize_rng_states

_WORKER_SETTINGS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip
"""Settings of a loader that its share takes over unchanged; older versions of PyTorch lack the last ones."""


class DataLoaderShard(DataLoader[Any]):
    """The share of one process in a loader.

    Attributes:
        end_of_dataloader: Whether the batch given last is the last one.
        batches_left: Number of batches still to come; `None` while the number is not known.

    Args:
        dataset: The data set.
        device: Where batches are moved to; `None` leaves them where they are.
        rng_types: Generators to synchronize over processes at the beginning of each epoch.
        synchronized_generator: The generator that `"generator"` among them means.
        skip_batches: Batches left out at the beginning, where there is no sampler that could do it.
        non_blocking: Whether copies to the device are asynchronous.
        order: The order of a loader that this one goes on with.
        source: A loader with an `__iter__` of its own, which gives the batches.
        **kwargs: As for `torch.utils.data.DataLoader`.
    """

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
        self.gradient_state = GradientState()
        self.end_of_dataloader = False
        self.batches_left: int | None = None
        self._real = -1
        self._place: Callable[[Any], Any] | None = (
            None
            if device is None
            else functools.partial(send_to_device, device=device, non_blocking=non_blocking)
        )

    @property
    def _index_sampler(self) -> Any:
        """Where PyTorch's iterators take indices from."""
        sampler = super()._index_sampler
        if isinstance(self.dataset, IterableDataset):
            return sampler
        return RememberedSampler(sampler, self.order, self.synchronized_generator)

    @property
    def _given_sampler(self) -> Any:
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    @property
    def remainder(self) -> int:
        """Number of samples in the current round that are not repeated; -1 where all are real."""
        return self._real

    @property
    def total_batch_size(self) -> int:
        """Number of samples that all processes together take at a time."""
        if isinstance(self.dataset, IterableDatasetShard):
            return int(self.batch_size or 1) * self.dataset.num_processes
        sampler = self._given_sampler
        while isinstance(sampler, SkipBatchSampler):
            sampler = sampler.batch_sampler
        if isinstance(sampler, BatchSamplerShard) and not sampler.split_batches:
            return int(sampler.batch_size or 0) * sampler.num_processes
        if isinstance(sampler, WholeBatchShard):
            return sampler.num_processes
        return int(getattr(sampler, "batch_size", None) or self.batch_size or 1)

    @property
    def total_dataset_length(self) -> int:
        """Number of samples of the whole data set."""
        length = getattr(self.dataset, "total_length", None)
        return len(self.dataset) if length is None else int(length)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next, wherever a sampler or the data set takes one."""
        set_epoch(self._given_sampler, epoch)
        for holder in (self.source, self.dataset):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)  # type: ignore[union-attr]

    def order_state(self) -> dict[str, Any]:
        """Return what the order of the next epoch is drawn from; amid an epoch, what that one was drawn from.

        Returns:
            Tensors and plain values.
        """
        generator, counter = self.synchronized_generator, epoch_counter(self._given_sampler)
        running = self.order.running
        began = None if running is None else running.beginning
        finished = running is not None and running.finished
        state = {
            "generator": None if generator is None else generator.get_state(),
            "host": None,
            "epoch": getattr(counter, "epoch", None),
            "initial_seed": getattr(counter, "initial_seed", None),
            "amid_epoch": began is not None and not finished,
            "finished": began is not None and finished,
        }
        if began is not None:
            state["generator"] = began.generator
        if began is not None and not finished:
            state |= {"host": began.host, "epoch": began.epoch}
        return state

    def load_order_state(self, state: dict[str, Any]) -> None:
        """Draw the order of the next epoch from what `order_state` returned."""
        generator, sampler = self.synchronized_generator, self._given_sampler
        self.order.running = self.order.resumed = None
        if state["generator"] is not None and generator is not None:
            generator.set_state(state["generator"])
            if state.get("finished"):
                host = host_rng_states()
                for _ in sampler:  # what the sampler had left to draw when its last batch was given out
                    pass
                set_host_rng_states(host)
        counter = epoch_counter(sampler)
        for name in ("epoch", "initial_seed"):
            if state[name] is not None and hasattr(counter, name):
                setattr(counter, name, state[name])
        if state.get("amid_epoch"):
            self.order.resumed = Beginning(state["generator"], state["host"], state["epoch"])

    def __len__(self) -> int:
        length = super().__len__() if self.source is None else len(self.source)
        return max(0, length - self.skip_batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.end_of_dataloader, self.batches_left, self._real = False, None, -1
        if self.source is not None or isinstance(self.dataset, IterableDataset):
            return self._look_ahead(*self._open())
        sampler = self._given_sampler
        exact = length_is_exact(sampler)
        epoch = self.order.running = Epoch(looks_ahead=not exact)
        persistent = self.num_workers > 0 and self.persistent_workers
        drawn = self.order.resumed is not None or (persistent and self.order.workers_are_seeded)
        if drawn and self._iterator is None:
            epoch.shelter(self.generator)
        batches = super().__iter__()  # draws a seed for workers; the interrupted run had drawn it before
        epoch.go_back()
        self.order.workers_are_seeded = persistent
        if not exact:
            return self._follow(batches, epoch)
        self.batches_left = len(sampler)
        return self._count_down(batches, epoch)

    def _count_down(self, batches: Iterator[Any], epoch: Epoch) -> Iterator[Any]:
        """Give out batches of a loader whose length is known; nothing is read before it is asked for."""
        place, left = self._place, self.batches_left or 0
        own = vars(
            self
        )  # setting an attribute of a DataLoader runs Python code that looks for reserved names
        self.gradient_state._add_dataloader(self)
        try:
            for batch in batches:
                left -= 1
                own["batches_left"] = left
                if left == 0:
                    self._end(epoch, batch)
                yield batch if place is None else place(batch)
        finally:
            self.order.end(epoch)
            self.gradient_state._remove_dataloader(self)

    def _follow(self, batches: Iterator[Any], epoch: Epoch) -> Iterator[Any]:
        """Give out batches of a loader whose sampler, being one ahead of them, knows which is the last."""
        place, given = self._place, 0
        self.gradient_state._add_dataloader(self)
        try:
            for batch in batches:
                given += 1
                if epoch.ended:
                    self.batches_left = epoch.handed - given
                    if given == epoch.handed:
                        self._end(epoch, batch)
                yield batch if place is None else place(batch)
        finally:
            self.order.end(epoch)
            self.gradient_state._remove_dataloader(self)

    def _end(self, epoch: Epoch, batch: Any) -> None:
        """Note that this batch is the last."""
        self.end_of_dataloader, self.batches_left = True, 0
        epoch.finished = True
        sampler = self._given_sampler
        real = int(getattr(sampler, "remainder", -1))
        while isinstance(sampler, SkipBatchSampler):
            sampler = sampler.batch_sampler
        if real > 0 and isinstance(sampler, WholeBatchShard):
            real *= find_batch_size(batch) or 1
        self._real = real

    def _open(self) -> tuple[Iterator[Any], Epoch]:
        """Begin an epoch whose order the data set, or the source, draws itself."""
        epoch = self.order.running = Epoch()
        resumed = self.order.resumed is not None
        with self.order.drawing(epoch, None, self.synchronized_generator, from_host=True):
            batches = super().__iter__() if self.source is None else iter(self.source)
            for _ in range(self.skip_batches if resumed else 0):
                next(batches, None)
        for _ in range(0 if resumed else self.skip_batches):
            next(batches, None)
        return batches, epoch

    def _look_ahead(self, batches: Iterator[Any], epoch: Epoch) -> Iterator[Any]:
        """Give out batches of a loader without a sampler, reading one ahead to know the last."""
        place = self._place
        marked = isinstance(self.dataset, IterableDatasetShard) and self.dataset.mark_last_round
        self.gradient_state._add_dataloader(self)
        try:
            for current in batches:
                for following in batches:
                    if marked:
                        self._real, current = current
                    yield current if place is None else place(current)
                    current = following
                self.end_of_dataloader, self.batches_left = True, 0
                self.order.end(epoch)
                if marked:
                    self._real, current = current
                yield current if place is None else place(current)
        finally:
            self.order.end(epoch)
            self.gradient_state._remove_dataloader(self)


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Sequence[str] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
) -> DataLoaderShard:
    """Make the share of one process in a loader.

    Args:
        dataloader: The loader, as a single process would use it.
        device: Where batches go; by default the device of the run.
        num_processes: Number of shares; by default the number of processes of the job.
        process_index: Which share; by default that of this process.
        split_batches: Whether the loader's batch size is that of all processes together.
        put_on_device: Whether to move batches to the device.
        rng_types: Generators to synchronize at the beginning of each epoch.
        dispatch_batches: Whether the main process reads for all; not available yet.
        even_batches: Whether to fill up the last round with samples from the beginning.
        slice_fn_for_dispatch: How dispatched batches are cut; goes with `dispatch_batches`.
        use_seedable_sampler: Whether shuffling depends on seed and epoch alone.
        data_seed: That seed; by default PyTorch's initial seed.
        non_blocking: Whether copies to the device are asynchronous.
        use_stateful_dataloader: Whether to build on torchdata; not available yet.

    Raises:
        UnsupportedOperationError: for what is not available yet.
        ConfigurationError: if batches cannot be shared out as asked.
    """
    for asked, name in (
        (dispatch_batches, "dispatch_batches"),
        (use_stateful_dataloader, "use_stateful_dataloader"),
    ):
        if asked:
            raise UnsupportedOperationError(
                f"{name}=True is not available in this version",
                hint=f"leave {name} out: every process then reads its own share",
            )
    if isinstance(dataloader, DataLoaderShard):
        return dataloader
    runtime = Runtime.current
    if runtime is not None:
        device = device or runtime.device
        num_processes = num_processes or runtime.topology.world_size
        process_index = runtime.topology.rank if process_index is None else process_index
    processes, index = num_processes or 1, process_index or 0
    settings = _worker_settings(dataloader)
    own: dict[str, Any] = {
        "device": device if put_on_device and not _in_host_memory(runtime, device) else None,
        "rng_types": tuple(rng_types or ()) if processes > 1 else (),
        "non_blocking": non_blocking,
    }
    dataset, source = dataloader.dataset, _own_iteration(dataloader, processes)
    if isinstance(dataset, IterableDataset):
        own["synchronized_generator"] = shared_generator(dataset, processes)
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
        if processes > 1:
            dataset, settings = _share_iterable(
                dataloader, settings, processes, index, split_batches, even_batches
            )
        return DataLoaderShard(dataset, source=source, **own, **settings)
    whole = dataloader.batch_sampler is None
    sampler, own["synchronized_generator"] = share_order(
        dataloader.sampler if whole else dataloader.batch_sampler, processes, use_seedable_sampler, data_seed
    )
    if processes > 1 and whole and getattr(sampler, "batch_size", None) is None:
        sampler = WholeBatchShard(sampler, processes, index, even_batches and not split_batches)
    elif processes > 1:
        sampler = BatchSamplerShard(sampler, processes, index, split_batches, even_batches)
    settings |= {"batch_size": None, "sampler": sampler} if whole else {"batch_sampler": sampler}
    return DataLoaderShard(dataset, source=source, **own, **settings)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Return a loader like `dataloader` without its first batches; they are not read where it has a sampler.

    Args:
        dataloader: A prepared or plain loader.
        num_batches: How many batches of this process to leave out.
    """
    settings = _worker_settings(dataloader)
    own: dict[str, Any] = {
        name: getattr(dataloader, name, None)
        for name in ("device", "rng_types", "synchronized_generator", "order")
    }
    own |= {"non_blocking": getattr(dataloader, "non_blocking", False)}
    source = dataloader.source if isinstance(dataloader, DataLoaderShard) else _own_iteration(dataloader, 1)
    if isinstance(dataloader.dataset, IterableDataset):
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
    elif dataloader.batch_sampler is None:
        settings |= {"batch_size": None, "sampler": dataloader.sampler}
    else:
        settings |= {"batch_sampler": dataloader.batch_sampler}
    skipped = getattr(dataloader, "skip_batches", 0) + num_batches
    if source is not None or isinstance(dataloader.dataset, IterableDataset):
        return DataLoaderShard(dataloader.dataset, skip_batches=skipped, source=source, **own, **settings)
    name = "batch_sampler" if "batch_sampler" in settings else "sampler"
    settings[name] = SkipBatchSampler(settings[name], num_batches)
    return DataLoaderShard(dataloader.dataset, **own, **settings)


def _worker_settings(dataloader: DataLoader[Any]) -> dict[str, Any]:
    settings = {name: getattr(dataloader, name) for name in _WORKER_SETTINGS if hasattr(dataloader, name)}
    if not settings.get("pin_memory_device", True):
        settings.pop("pin_memory_device")
    return settings


def _own_iteration(dataloader: DataLoader[Any], processes: int) -> DataLoader[Any] | None:
    """Return a loader that has an `__iter__` of its own, which only one process can use as it is."""
    if type(dataloader).__iter__ is DataLoader.__iter__:
        return None
    if processes > 1:
        raise ConfigurationError(
            "a loader with an __iter__ of its own cannot be shared out over processes",
            found=f"{type(dataloader).__name__}.__iter__",
            reason="it would be replaced by that of the share of one process",
            hint="a plain DataLoader; what __iter__ does can go into its data set, sampler or collate_fn",
        )
    return dataloader


def _in_host_memory(runtime: Runtime | None, device: torch.device | None) -> bool:
    """Whether batches are where they are wanted as soon as they are made."""
    return runtime is not None and device == runtime.device and runtime.backend.capabilities().host_memory


def _share_iterable(
    dataloader: DataLoader[Any], settings: dict[str, Any], processes: int, index: int, split: bool, even: bool
) -> tuple[Any, dict[str, Any]]:
    """Share out an iterable data set by taking turns sample by sample."""
    batch_size = dataloader.batch_size
    if batch_size is None:
        raise ConfigurationError(
            "an iterable data set that gives whole batches cannot be shared out over processes",
            found="DataLoader(batch_size=None)",
            hint="give single samples and a batch_size",
        )
    dataset = IterableDatasetShard(
        dataloader.dataset,
        batch_size=batch_size,
        drop_last=dataloader.drop_last,
        num_processes=processes,
        process_index=index,
        split_batches=split,
        even_batches=even,
        mark_last_round=True,
    )
    collate = functools.partial(collate_round, collate=dataloader.collate_fn)
    size = batch_size // processes if split else batch_size
    return dataset, settings | {"batch_size": size, "collate_fn": collate}
