"""Loaders built on torchdata's `StatefulDataLoader`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from torchport.data.dispatcher import DataLoaderDispatcher
from torchport.data.loader import DataLoaderShard
from torchport.data.order import Epoch
from torchport.errors import ConfigurationError, UnsupportedOperationError


def stateful_loader(
    kind: type, source: Any, own: dict[str, Any], settings: dict[str, Any]
) -> DataLoaderShard:
    """Make a share whose batches are read by a `StatefulDataLoader`.

    Args:
        kind: The kind of loader it would be otherwise.
        source: A loader with an `__iter__` of its own.
        own: Arguments of `DataLoaderShard`.
        settings: Arguments of `DataLoader`.

    Raises:
        UnsupportedOperationError: if torchdata is not installed.
        ConfigurationError: if batches are to be dispatched, or come from a loader of the user's.
    """
    if kind is DataLoaderDispatcher or source is not None:
        found = "a loader with an __iter__ of its own" if source is not None else "dispatch_batches"
        raise ConfigurationError(
            "use_stateful_dataloader lets each process read its share with torchdata",
            found=found,
            hint="dispatch_batches=False, or leave use_stateful_dataloader out: every loader can be resumed exactly",
        )
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise UnsupportedOperationError(
            "use_stateful_dataloader=True needs torchdata",
            found=str(error),
            hint="pip install 'torchdata>=0.8'; or leave it out: every loader can be resumed exactly without it",
        ) from error
    return StatefulShard(reader=StatefulDataLoader, **own, **settings)


class StatefulShard(DataLoaderShard):
    """The share of one process, read by a `StatefulDataLoader`, whose own state a checkpoint holds.

    Attributes:
        reader: The `StatefulDataLoader`.
        reader_class: Its class.

    Args:
        dataset: The data set.
        reader: The class of the reader.
        **kwargs: As for `DataLoaderShard`.
    """

    tells_what_is_left_out = False  # who asks for such a loader knows that it goes on by itself

    def __init__(self, dataset: Any, reader: Any, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.reader_class = reader
        names = (
            "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
            "generator", "prefetch_factor", "persistent_workers",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        if isinstance(self.dataset, IterableDataset):
            settings |= {"batch_size": self.batch_size, "drop_last": self.drop_last}
        elif self.batch_sampler is None:
            settings |= {"batch_size": None, "sampler": self.sampler}
        else:
            settings |= {"batch_sampler": self.batch_sampler}
        self.reader = reader(self.dataset, **settings)

    def order_state(self) -> dict[str, Any]:
        """Return what the next epoch is drawn from and, amid one, the reader's state."""
        state = super().order_state()
        running = self.order.running
        if running is None:
            return {"reader": None} | state  # of a checkpoint that has not been acted upon, with its reader
        return state | {"reader": running.reader if state["amid_epoch"] else None}

    def _batches(self) -> Iterator[Any]:
        epoch = self._begin()
        resumed = self.order.resumed
        place = None if resumed is None or self.from_beginning else resumed.state.get("reader")
        if place is not None:  # not before: a loader without the first batches may go on instead of this one
            self.reader.load_state_dict(place)
        epoch.dataset = None
        with self.order.drawing(epoch, self.given_sampler, self.synchronized_generator, from_host=True):
            batches = iter(self.reader)
            first = list(itertools.islice(batches, 1))
        skipped = self.skip_batches if place is None else 0
        states: deque[Any] = deque()  # of the batches read and not yet given out: two, if copied ahead
        read = self._noting(itertools.islice(itertools.chain(first, batches), skipped, None), states)
        placed = read if self.prefetch is None else self.prefetch(read)
        return self._look_ahead(self._with_states(placed, states), epoch)

    def _noting(self, batches: Iterator[Any], states: deque[Any]) -> Iterator[Any]:
        """Note the reader's state behind each batch; it stays on the host, whatever tensors it holds."""
        for batch in batches:
            states.append(self.reader.state_dict())
            yield batch

    @staticmethod
    def _with_states(batches: Iterator[Any], states: deque[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch, states.popleft()

    def _take(self, read: Any, epoch: Epoch) -> Any:
        batch, epoch.reader = read
        return super()._take(batch, epoch)
