"""Loaders that give each process its share of a data set, on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from torchport.data.iterable import IterableDatasetShard
from torchport.data.samplers import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.ops.pytree import send_to_device
from torchport.runtime import Runtime
from torchport.state import GradientState
from torchport.training.random import synchronize_rng_states

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
        skip_batches: Batches left out at the beginning.
        non_blocking: Whether copies to the device are asynchronous.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.device = device
        self.rng_types = tuple(rng_types or ())
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.non_blocking = non_blocking
        self.gradient_state = GradientState()
        self.end_of_dataloader = False
        self.batches_left: int | None = None
        self._place: Callable[[Any], Any] | None = (
            None
            if device is None
            else functools.partial(send_to_device, device=device, non_blocking=non_blocking)
        )

    @property
    def remainder(self) -> int:
        """Number of samples in the last round that are not repeated; -1 where all are real."""
        source = self.dataset if isinstance(self.dataset, IterableDatasetShard) else self.batch_sampler
        return int(getattr(source, "remainder", -1)) if self.end_of_dataloader else -1

    @property
    def total_batch_size(self) -> int:
        """Number of samples that all processes together take at a time."""
        sampler = self.batch_sampler
        if isinstance(sampler, SkipBatchSampler):
            sampler = sampler.batch_sampler
        if isinstance(sampler, BatchSamplerShard) and not sampler.split_batches:
            return int(sampler.batch_size or 0) * sampler.num_processes
        return int(getattr(sampler, "batch_size", None) or self.batch_size or 1)

    @property
    def total_dataset_length(self) -> int:
        """Number of samples of the whole data set."""
        length = getattr(self.dataset, "total_length", None)
        return len(self.dataset) if length is None else int(length)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next, where the sampler or the data set takes one."""
        for holder in (
            self.batch_sampler,
            getattr(self.batch_sampler, "sampler", None),
            self.sampler,
            self.dataset,
        ):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)  # type: ignore[union-attr]
                return

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.end_of_dataloader = False
        self.batches_left = None if isinstance(self.dataset, IterableDataset) else len(self)
        batches = super().__iter__()
        return self._look_ahead(batches) if self.batches_left is None else self._count_down(batches)

    def _count_down(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give out batches of a loader whose length is known; nothing is read before it is asked for."""
        place, left = self._place, self.batches_left or 0
        own = vars(self)  # setting an attribute of a DataLoader runs Python code that looks for reserved names
        self.gradient_state._add_dataloader(self)
        try:
            for batch in batches:
                left -= 1
                own["batches_left"] = left
                if left == 0:
                    self.end_of_dataloader = True
                yield batch if place is None else place(batch)
        finally:
            self.gradient_state._remove_dataloader(self)

    def _look_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Give out batches of a loader without a length, reading one ahead to know the last."""
        place = self._place
        for _ in range(self.skip_batches):
            next(batches, None)
        self.gradient_state._add_dataloader(self)
        try:
            for current in batches:
                for following in batches:
                    yield current if place is None else place(current)
                    current = following
                self.end_of_dataloader, self.batches_left = True, 0
                yield current if place is None else place(current)
        finally:
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
    settings = {name: getattr(dataloader, name) for name in _WORKER_SETTINGS if hasattr(dataloader, name)}
    if not settings.get("pin_memory_device", True):
        settings.pop("pin_memory_device")
    placed = device if put_on_device and not _in_host_memory(runtime, device) else None

    dataset, generator = dataloader.dataset, None
    if isinstance(dataset, IterableDataset):
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
        if processes > 1:
            dataset, settings = _share_iterable(
                dataloader, settings, processes, index, split_batches, even_batches
            )
    else:
        generator = _shared_order(dataloader, processes, use_seedable_sampler, data_seed)
        batch_sampler: Any = dataloader.batch_sampler
        if batch_sampler is None:  # batch_size=None: the data set gives whole batches
            batch_sampler = _WholeBatches(dataloader.sampler, batch_size=1, drop_last=False)
            settings["collate_fn"] = functools.partial(_only_batch, collate=dataloader.collate_fn)
            even_batches = even_batches and not split_batches
        if processes > 1:
            batch_sampler = BatchSamplerShard(batch_sampler, processes, index, split_batches, even_batches)
        settings["batch_sampler"] = batch_sampler
    return DataLoaderShard(
        dataset,
        device=placed,
        rng_types=tuple(rng_types or ()) if processes > 1 else (),
        synchronized_generator=generator,
        non_blocking=non_blocking,
        **settings,
    )


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Return a loader like `dataloader` without its first batches; they are not read where it has a sampler.

    Args:
        dataloader: A prepared or plain loader.
        num_batches: How many batches of this process to leave out.
    """
    settings = {name: getattr(dataloader, name) for name in _WORKER_SETTINGS if hasattr(dataloader, name)}
    if not settings.get("pin_memory_device", True):
        settings.pop("pin_memory_device")
    own = {
        name: getattr(dataloader, name, None) for name in ("device", "rng_types", "synchronized_generator")
    } | {"non_blocking": getattr(dataloader, "non_blocking", False)}
    if isinstance(dataloader.dataset, IterableDataset):
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
        return DataLoaderShard(dataloader.dataset, skip_batches=num_batches, **own, **settings)
    sampler = SkipBatchSampler(dataloader.batch_sampler, num_batches)
    return DataLoaderShard(dataloader.dataset, batch_sampler=sampler, **own, **settings)


class _WholeBatches(BatchSampler):
    """Indices of a data set that gives whole batches, one at a time."""


def _only_batch(batches: list[Any], collate: Callable[[Any], Any]) -> Any:
    return collate(batches[0])


def _in_host_memory(runtime: Runtime | None, device: torch.device | None) -> bool:
    """Whether batches are where they are wanted as soon as they are made."""
    return runtime is not None and device == runtime.device and runtime.backend.capabilities().host_memory


def _shared_order(
    dataloader: DataLoader[Any], processes: int, seedable: bool, data_seed: int | None
) -> torch.Generator | None:
    """Make a shuffled loader draw the same order on every process; return the generator to synchronize."""
    batch_sampler = dataloader.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None) if batch_sampler is not None else dataloader.sampler
    if seedable and isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler):
        sampler = SeedableRandomSampler(
            sampler.data_source,
            replacement=sampler.replacement,
            num_samples=sampler._num_samples,
            generator=sampler.generator,
            data_seed=data_seed,
        )
        if batch_sampler is not None:
            batch_sampler.sampler = sampler  # type: ignore[attr-defined]
    if processes > 1 and isinstance(sampler, RandomSampler) and sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    generator = getattr(sampler, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


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
    )
    return dataset, settings | {"batch_size": batch_size // processes if split else batch_size}
