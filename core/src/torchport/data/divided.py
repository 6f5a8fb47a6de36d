"""Loaders of iterable data sets that divide themselves: each process reads its own part, and no other."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from torchport.data.iterable import IterableDatasetShard, Read
from torchport.data.loader import DataLoaderShard
from torchport.data.order import Epoch
from torchport.data.position import own_part
from torchport.errors import DataLoadingError
from torchport.ops.pytree import find_batch_size
from torchport.plugin.collectives import Collectives

_NONE, _GIVEN, _FAILED = 0, 1, 2


class Agreed(NamedTuple):
    """A batch of a round that all processes take.

    Attributes:
        read: The batch.
        real: For each process, how many samples of its batch are not repeated ones; `None` if all are.
    """

    read: Read
    real: tuple[int, ...] | None


def divides(dataset: Any, parts: int) -> bool:
    """Whether a data set has a method `shard(num_shards=..., index=...)`, and enough shards for so many parts."""
    if not callable(getattr(dataset, "shard", None)):
        return False
    shards = getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", None)
    return isinstance(shards, int) and shards >= parts


class DividedLoader(DataLoaderShard):
    """A loader whose process reads its own part of a data set.

    Parts may be of different lengths. Before a batch is given out, processes tell each other by one small collective
    whether they have another. One that has none takes a copy of another's, all of which counts as repeated; with
    `drop_last`, the epoch ends there for all. An error of one process's data set is raised on every process.

    Args:
        dataset: The part, as an `IterableDatasetShard`.
        collectives: The open process group.
        part: Index of this process.
        agreement_device: The device whose tensors the group exchanges.
        **kwargs: As for `DataLoaderShard`.
    """

    def __init__(
        self, dataset: Any, collectives: Collectives, part: int, agreement_device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.collectives = collectives
        self.part = part
        self.agreement_device = agreement_device

    @property
    def parts(self) -> int:
        """Number of parts of the data set."""
        return self.collectives.world_size

    @property
    def total_dataset_length(self) -> int:
        """Number of samples of the whole data set."""
        whole: Any = self.dataset
        return len(whole.undivided)

    def __len__(self) -> int:
        raise TypeError("the number of batches is that of the longest part, which no process knows")

    def order_state(self) -> dict[str, Any]:
        """Return where every process's part stands; call it on every process.

        Raises:
            DataLoadingError: if the part of another process cannot say where it stands; there, its own error is raised.
        """
        mine: dict[str, Any] = {}
        packed: bytes | None = None
        error: Exception | None = None
        try:
            mine = super().order_state()
            packed = pickle.dumps(mine)
        except Exception as raised:
            error = raised
        parts = self.collectives.all_gather_object(packed)
        if error is not None:
            raise error
        if None in parts:
            raise _failure(parts.index(None), "could not say where its part stands")
        return mine | {"parts": [pickle.loads(part) for part in parts]}

    def load_order_state(self, state: dict[str, Any]) -> None:
        """Go on, with the next pass, from where this process's part stood."""
        super().load_order_state(own_part(state, self.parts, self.part))

    def _start(self) -> Iterator[Any]:
        return self._agreed(super()._start())

    def _go_on(self, places: dict[int, Any], next_reader: int) -> Iterator[Any]:
        return self._agreed(super()._go_on(places, next_reader))

    def _agreed(self, batches: Iterator[Any]) -> Iterator[Agreed]:
        """Yield a batch for every round in which any process has one; with `drop_last`, in which all have."""
        shard: Any = self.dataset
        while True:
            read: Read | None = None
            error: Exception | None = None
            try:
                read = next(batches, None)
            except Exception as raised:
                error = raised
            has, real, full = self._exchange(read, error)
            if not any(has) or (shard.drop_last and not all(has)):
                return
            batch = [None if read is None else read.batch]
            if not all(has):
                self.collectives.broadcast_object_list(batch, has.index(_GIVEN))
            read = Read(batch[0], 0, 0, None) if read is None else read
            yield Agreed(read, None if all(full) else tuple(real))

    def _exchange(self, read: Read | None, error: Exception | None) -> tuple[list[int], list[int], list[int]]:
        """Tell the other processes what this one has.

        Returns:
            For each process, whether it has a batch, how many real samples are in it, and whether all of them are.
        """
        status = _FAILED if error is not None else _NONE if read is None else _GIVEN
        real, full = (0, 0) if read is None else (self._rows(read), int(read.real < 0))
        mine = torch.tensor([[status, real, full]], device=self.agreement_device)
        has, reals, fulls = self.collectives.all_gather(mine).T.tolist()
        if error is not None:
            raise error
        if _FAILED in has:
            raise _failure(has.index(_FAILED), "could not read the next batch of its part")
        return has, reals, fulls

    def _rows(self, read: Read) -> int:
        """Return the number of real samples in a batch: what its tensors say, or else what was asked for."""
        if read.real >= 0:
            return read.real
        try:
            found = find_batch_size(read.batch)
        except ValueError:  # a tensor without dimensions
            found = None
        shard: Any = self.dataset
        return int(shard.share) if found is None else found

    def _take(self, read: Any, epoch: Epoch) -> Any:
        batch = super()._take(read.read, epoch)
        self.real_samples = read.real
        self._real = -1 if read.real is None else sum(read.real)
        return batch


def _failure(rank: int, what: str) -> DataLoadingError:
    return DataLoadingError(
        f"rank {rank} {what}",
        reason="its data set raised an error",
        hint=f"look at the error of rank {rank}",
    )


class DividedDataset(IterableDatasetShard):
    """The part of one process in a data set that divides itself, in batches of one size.

    Args:
        dataset: The whole data set.
        **kwargs: As for `IterableDatasetShard`.
    """

    def __init__(self, dataset: Any, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.undivided = dataset
        self.dataset = dataset.shard(num_shards=self.num_processes, index=self.process_index)

    @property
    def total_length(self) -> int:
        """Number of samples of the whole data set, where it knows."""
        return len(self.undivided)

    def __len__(self) -> int:
        raise TypeError("the number of samples with repeated ones is that of the longest part")

    @property
    def _turn(self) -> tuple[int, int]:
        return self.share, 0
