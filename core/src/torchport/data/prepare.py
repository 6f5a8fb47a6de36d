"""Turn a loader as one process would use it into the share of each process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchport.data.dispatcher import Channel, CollectiveChannel, DataLoaderDispatcher
from torchport.data.divided import DividedDataset, DividedLoader, divides
from torchport.data.iterable import IterableDatasetShard, ReadCollate, WatchedCollate, has_state
from torchport.data.loader import DataLoaderShard
from torchport.data.order import share_order, shared_generator
from torchport.data.prefetch import Prefetch, ReadAhead
from torchport.data.samplers import EVERY, BatchSamplerShard, WholeBatchShard, length_is_exact
from torchport.errors import ConfigurationError
from torchport.runtime import Runtime

_WORKER_SETTINGS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip
"""Settings of a loader that its share takes over unchanged; older versions of PyTorch lack the last ones."""


@dataclass(frozen=True, slots=True)
class _Sharing:
    """How batches are shared out.

    Attributes:
        processes: Number of processes.
        index: This process; `EVERY` if the main process reads for all.
        split: Whether batches are cut into parts.
        even: Whether the last round is filled up.
    """

    processes: int
    index: int
    split: bool
    even: bool

    @property
    def step(self) -> int:
        return 1 if self.split else self.processes


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
    prefetch_to_device: bool = True,
    channel: Channel | None = None,
    readers: int = 1,
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
        dispatch_batches: Whether the main process reads for all and sends the others their batches; by default it
            does for iterable data sets that do not divide themselves (`torchport.data.divided`).
        even_batches: Whether to fill up the last round with samples from the beginning.
        slice_fn_for_dispatch: How dispatched batches are cut; goes with `dispatch_batches`.
        use_seedable_sampler: Whether shuffling depends on seed and epoch alone.
        data_seed: That seed; by default PyTorch's initial seed.
        non_blocking: Whether copies to the device are asynchronous.
        use_stateful_dataloader: Whether to build on torchdata's `StatefulDataLoader`.
        prefetch_to_device: Whether the next batch is copied while the current one is computed on, where the device
            has streams or the backend a way of its own.
        channel: How dispatched batches are sent; by default with the collectives of the run.
        readers: Number of processes that read each share, alike.

    Raises:
        ConfigurationError: if batches cannot be shared out as asked.
    """
    if isinstance(dataloader, DataLoaderShard):
        return dataloader
    runtime = Runtime.current
    if runtime is not None:
        device = device or runtime.device
        num_processes = num_processes or runtime.topology.world_size
        process_index = runtime.topology.rank if process_index is None else process_index
    processes, index = num_processes or 1, process_index or 0
    placed = device if put_on_device and not _in_host_memory(runtime, device) else None
    own: dict[str, Any] = {
        "device": placed,
        "rng_types": tuple(rng_types or ()) if processes * readers > 1 else (),
        "non_blocking": non_blocking,
    }
    dataset, source = dataloader.dataset, _own_iteration(dataloader, processes)
    iterable = isinstance(dataset, IterableDataset)
    divided = even_batches and not (dispatch_batches or channel or use_stateful_dataloader) and iterable
    divided = divided and _exchanges(runtime, processes, index) and divides(dataset, processes)
    if processes > 1 and not divided:
        channel = _channel(dispatch_batches, channel, runtime, processes, index, iterable=iterable)
    else:
        channel = None
    if channel is not None:
        own |= {"channel": channel, "slice_fn": slice_fn_for_dispatch}
    elif prefetch_to_device and placed is not None:
        own["prefetch"] = _prefetch(runtime, placed)
    sharing = _Sharing(processes, index if channel is None else EVERY, split_batches, even_batches)
    own["step"] = sharing.step
    kind: Any = DataLoaderShard if channel is None else DataLoaderDispatcher
    if divided and runtime is not None:
        kind = DividedLoader
        own |= {"collectives": runtime.collectives, "part": index, "agreement_device": runtime.device}
    if iterable:
        if processes > 1 and channel is None and not divided and index == 0:
            _tell_that_all_read(dataset, processes)
        own["synchronized_generator"] = shared_generator(dataset, processes * readers)
        settings = _share_iterable(dataloader, sharing, DividedDataset if divided else IterableDatasetShard)
        if divided:
            own["synchronized_generator"] = shared_generator(settings["dataset"].dataset, processes)
    else:
        settings, own["synchronized_generator"] = _share_samples(
            dataloader, sharing, use_seedable_sampler, data_seed, processes * readers
        )
    if use_stateful_dataloader:
        from torchport.data.stateful import stateful_loader

        return stateful_loader(kind, source, own, settings)
    return kind(source=source, **own, **settings)  # type: ignore[no-any-return]


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Return a loader like `dataloader` without its first batches; they are not read where it has a sampler.

    Args:
        dataloader: A prepared or plain loader.
        num_batches: How many batches of this process to leave out, from the beginning of the epoch.
    """
    prepared = isinstance(dataloader, DataLoaderShard)
    settings = _worker_settings(dataloader) | {"dataset": dataloader.dataset}
    if isinstance(dataloader.dataset, IterableDataset):
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
    elif dataloader.batch_sampler is None:
        settings |= {"batch_size": None, "sampler": dataloader.sampler}
    else:
        settings |= {"batch_sampler": dataloader.batch_sampler}
    if not prepared:
        return DataLoaderShard(source=_own_iteration(dataloader, 1), skip_batches=num_batches, **settings)
    names = (
        "device", "rng_types", "synchronized_generator", "order", "non_blocking", "source", "step", "prefetch",
        "channel", "slice_fn", "collectives", "part", "agreement_device",
    )  # fmt: skip
    own = {name: getattr(dataloader, name) for name in names if hasattr(dataloader, name)}
    if hasattr(dataloader, "reader_class"):
        own["reader"] = dataloader.reader_class
    skipped = dataloader.skip_batches + num_batches
    return type(dataloader)(skip_batches=skipped, from_beginning=True, **own, **settings)


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


def _prefetch(runtime: Runtime | None, device: torch.device) -> ReadAhead | None:
    """Return what copies batches ahead: the backend's own way, or a copy on a stream where the device has them."""
    if runtime is None or device != runtime.device:
        return None
    streams = runtime.backend.capabilities().streams
    return runtime.backend.read_ahead(device) or (Prefetch(runtime.backend, device) if streams else None)


def _exchanges(runtime: Runtime | None, processes: int, index: int) -> bool:
    """Whether the shares are those of the processes of the run, which can exchange tensors."""
    if runtime is None or runtime.collectives is None or processes == 1:
        return False
    return runtime.topology.world_size == processes and runtime.topology.rank == index


def _channel(
    dispatch: bool | None,
    channel: Channel | None,
    runtime: Runtime | None,
    processes: int,
    index: int,
    *,
    iterable: bool,
) -> Channel | None:
    """Return how batches are sent, if the main process reads for all."""
    if not (iterable if dispatch is None else dispatch):
        return None
    if channel is not None:
        return channel
    if runtime is not None and runtime.collectives is not None and _exchanges(runtime, processes, index):
        return CollectiveChannel(runtime.collectives, index, processes, runtime.device)
    if dispatch is None:
        return None
    raise ConfigurationError(
        "dispatch_batches sends batches from the main process of the run to the others, a different one to each",
        found=f"{processes} shares asked for, not in a run of as many processes",
        hint="leave dispatch_batches out; or make an Accelerator first, without processes that share batches",
    )


def _tell_that_all_read(dataset: Any, processes: int) -> None:
    warnings.warn(
        f"each of the {processes} processes reads all of {type(dataset).__name__} and keeps its share of it."
        " With dispatch_batches=True (or left out) the main process alone reads it.",
        stacklevel=4,
    )


def _share_samples(
    dataloader: DataLoader[Any], sharing: _Sharing, seedable: bool, data_seed: int | None, drawing: int
) -> tuple[dict[str, Any], torch.Generator | None]:
    """Share out a data set whose samples are chosen by a sampler, which `drawing` processes draw from alike."""
    whole = dataloader.batch_sampler is None
    sampler, generator = share_order(
        dataloader.sampler if whole else dataloader.batch_sampler, drawing, seedable, data_seed
    )
    if sharing.processes > 1 and whole and getattr(sampler, "batch_size", None) is None:
        even = sharing.even and not sharing.split
        sampler = WholeBatchShard(sampler, sharing.processes, sharing.index, even)
    elif sharing.processes > 1:
        _refuse_missing_parts(sampler, sharing)
        sampler = BatchSamplerShard(sampler, sharing.processes, sharing.index, sharing.split, sharing.even)
    settings = _worker_settings(dataloader) | {"dataset": dataloader.dataset}
    return settings | (
        {"batch_size": None, "sampler": sampler} if whole else {"batch_sampler": sampler}
    ), generator


def _refuse_missing_parts(sampler: Any, sharing: _Sharing) -> None:
    """Refuse batches of which a process may get no part, where they are sent in rounds."""
    if sharing.index == EVERY and sharing.split and not sharing.even and not length_is_exact(sampler):
        raise ConfigurationError(
            "batches of varying sizes cannot be split and dispatched without being filled up",
            found=type(sampler).__name__,
            reason="there may be no part for some process amid an epoch",
            hint="dispatch_batches=False, split_batches=False or even_batches=True",
        )


def _share_iterable(
    dataloader: DataLoader[Any], sharing: _Sharing, kind: type[IterableDatasetShard]
) -> dict[str, Any]:
    """Share out a data set that chooses its samples itself, by turns or into the parts that it makes."""
    dataset, size = dataloader.dataset, dataloader.batch_size
    settings = _worker_settings(dataloader)
    settings |= {"dataset": dataset, "batch_size": size, "drop_last": dataloader.drop_last}
    if dataloader.num_workers > 1 and dataloader.worker_init_fn is None:
        settings["collate_fn"] = WatchedCollate(dataloader.collate_fn)
    keeps_place = has_state(dataset)
    if sharing.processes == 1 and (not keeps_place or _own_iteration(dataloader, 1) is not None):
        return settings
    if size is None and sharing.processes > 1 and sharing.index != EVERY and kind is IterableDatasetShard:
        raise ConfigurationError(
            "an iterable data set that gives whole batches cannot be shared out over processes",
            found="DataLoader(batch_size=None)",
            hint="give single samples and a batch_size, or dispatch_batches=True",
        )
    shard = kind(
        dataset,
        batch_size=size or 1,
        drop_last=dataloader.drop_last,
        num_processes=sharing.processes,
        process_index=sharing.index,
        split_batches=sharing.split and size is not None,
        even_batches=sharing.even and sharing.processes > 1,
        mark=sharing.processes > 1,
    )
    keeps_place = has_state(shard.dataset)
    collate = ReadCollate(shard, settings["collate_fn"], batched=size is not None, keeps_place=keeps_place)
    return settings | {
        "dataset": shard,
        "batch_size": None if size is None else shard.share,
        "collate_fn": collate,
    }
