"""Loaders for which one process reads, and sends each of the others its batches."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchport.data.iterable import Read
from torchport.data.loader import DataLoaderShard
from torchport.data.order import Epoch, share_length
from torchport.data.samplers import WholeBatchShard, length_is_exact
from torchport.errors import DataLoadingError
from torchport.ops.packing import pack, unpack
from torchport.ops.pytree import concatenate, find_batch_size, send_to_device
from torchport.plugin.collectives import Collectives


@dataclass(slots=True)
class Message:
    """What the reading process sends to one of the others in each round.

    Attributes:
        batch: Its batch.
        given: Whether there is a batch for it.
        left: Batches that it will get after this one; `None` if that is not known and there are more.
        more: Whether a further round follows, for any process.
        real: For each process, how many samples of its batch are not repeated ones; `None` if all are.
        error: Traceback of the error that ended the reading.
    """

    batch: Any = None
    given: bool = False
    left: int | None = 0
    more: bool = False
    real: tuple[int, ...] | None = None
    error: str = ""


class Channel(Protocol):
    """How one process sends something to each of the others."""

    rank: int
    world_size: int

    def pack(self, messages: list[Message]) -> Any:
        """Return messages as they are sent; raises where that cannot be done, before anything is sent."""

    def send(self, packed: Any) -> None:
        """Send each process its message, of those that `pack` was given; called on rank 0."""

    def receive(self) -> Message:
        """Return the message for this process; called on the others."""


class CollectiveChannel:
    """Sends by two collectives: the size of the largest message, and the messages.

    Args:
        collectives: The open process group.
        rank: Index of this process.
        world_size: Number of processes.
        device: The device whose tensors the group exchanges.
    """

    def __init__(self, collectives: Collectives, rank: int, world_size: int, device: torch.device) -> None:
        self.collectives = collectives
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def pack(self, messages: list[Message]) -> list[torch.Tensor]:
        """Return each message as bytes; nothing for this process."""
        return [torch.empty(0, dtype=torch.uint8), *(pack(message) for message in messages[1:])]

    def send(self, packed: list[torch.Tensor]) -> None:
        """Send each process its message."""
        size = max(len(part) for part in packed)
        self.collectives.broadcast(torch.tensor([size], device=self.device))
        parts = [torch.nn.functional.pad(part, (0, size - len(part))).to(self.device) for part in packed]
        self.collectives.scatter(torch.empty_like(parts[0]), parts)

    def receive(self) -> Message:
        """Return the message for this process."""
        size = int(self.collectives.broadcast(torch.zeros(1, dtype=torch.int64, device=self.device)))
        packed = torch.empty(size, dtype=torch.uint8, device=self.device)
        message: Message = unpack(self.collectives.scatter(packed))
        return message


class DataLoaderDispatcher(DataLoaderShard):
    """A loader whose data set is read by the main process alone, which sends the others their batches.

    Every process gets the batches that a `DataLoaderShard` would give it. Batches may hold anything that can be
    pickled; tensors are sent as they are. An error of the data set, or a batch that cannot be pickled, is raised on
    every process.

    Args:
        dataset: The data set.
        channel: How batches are sent.
        slice_fn: How batches of all processes, concatenated, are cut instead: called as
            `slice_fn(batch, slice, process_index=..., num_processes=...)`.
        **kwargs: As for `DataLoaderShard`.
    """

    def __init__(
        self, dataset: Any, channel: Channel, slice_fn: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.channel = channel
        self.slice_fn = slice_fn

    @property
    def reads_for(self) -> int:
        """Number of processes for which the main process reads."""
        return self.channel.world_size

    def __len__(self) -> int:
        every = DataLoader.__len__(self)
        rounds = -(-(every - self.channel.rank) // self.channel.world_size)
        return max(0, rounds - self.skip_batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        epoch = self._begin()
        if self.channel.rank != 0:
            return self._give(self._receive(), epoch)
        return self._give(self._send(epoch), epoch)

    def _give(self, messages: Iterator[Message], epoch: Epoch) -> Iterator[Any]:
        """Give out the batches of this process."""
        self.gradient_state._add_dataloader(self)
        try:
            for message in messages:
                if not message.given:
                    continue
                self._note(message)
                if self.channel.rank != 0:
                    epoch.given += 1
                self.gradient_state.active_dataloader = self
                yield self._placed(message.batch)
        finally:
            self._close(epoch)

    def _placed(self, batch: Any) -> Any:
        if self._place is not None:
            return self._place(batch)
        return batch if self.channel.rank == 0 else send_to_device(batch, "cpu")

    def _note(self, message: Message) -> None:
        """Take over what is known about a round."""
        self.batches_left, self.real_samples = message.left, message.real
        self._real = -1 if message.real is None else sum(message.real)
        self.end_of_dataloader = message.left == 0

    def _receive(self) -> Iterator[Message]:
        """Receive the messages of an epoch."""
        more = True
        while more:
            message = self.channel.receive()
            if message.error:
                raise DataLoadingError(
                    "the main process could not read the next batch, or pickle it",
                    reason=message.error,
                    hint="look at the error of rank 0, which reads the data for all processes",
                )
            yield message
            more = message.more

    def _send(self, epoch: Epoch) -> Iterator[Message]:
        """Read the batches of all, and send the others theirs."""
        rounds = self._rounds(epoch)
        while True:
            try:
                taken = next(rounds, None)
                messages = [Message()] * self.channel.world_size if taken is None else self._cut(*taken)
                packed = self.channel.pack(messages)
            except Exception:
                told = [Message(error=traceback.format_exc())] * self.channel.world_size
                self.channel.send(self.channel.pack(told))
                raise
            self.channel.send(packed)
            del packed
            yield messages[0]
            if not messages[0].more:
                return

    def _cut(self, batches: list[Any], lefts: list[int | None], more: bool) -> list[Message]:
        """Make the messages of a round."""
        real = self._real_of(batches, last=not more)
        values = [batch.batch if isinstance(batch, Read) else batch for batch in batches]
        if self.slice_fn is not None:
            whole = concatenate(values)
            size = find_batch_size(values[0]) or 1
            values = [
                self.slice_fn(
                    whole,
                    slice(rank * size, (rank + 1) * size),
                    process_index=rank,
                    num_processes=len(values),
                )
                for rank in range(len(values))
            ]
        messages = [
            Message(value, True, left, more, real) for value, left in zip(values, lefts, strict=False)
        ]
        return messages + [Message(more=more, real=real)] * (self.channel.world_size - len(values))

    def _real_of(self, batches: list[Any], *, last: bool) -> tuple[int, ...] | None:
        """Return how many samples of each batch of a round are real; `None` if all are."""
        sizes = [self._rows(batch.batch if isinstance(batch, Read) else batch) for batch in batches]
        if isinstance(batches[0], Read):
            if all(batch.real < 0 for batch in batches):
                return None
            return tuple(b.real if b.real >= 0 else n for b, n in zip(batches, sizes, strict=True))
        sampler = self.given_sampler
        real = int(getattr(sampler, "remainder", -1)) if last else -1
        if real <= 0:
            return None
        if isinstance(sampler, WholeBatchShard):
            return tuple(size if rank < real else 0 for rank, size in enumerate(sizes))
        offsets = itertools.accumulate(sizes, initial=0)
        return tuple(min(size, max(0, real - offset)) for size, offset in zip(sizes, offsets, strict=False))

    def _rows(self, batch: Any) -> int:
        """Return the number of samples in a batch: what its tensors say, or else what was asked for."""
        try:
            found = find_batch_size(batch)
        except ValueError:  # a tensor without dimensions
            found = None
        return self.total_batch_size // self.channel.world_size if found is None else found

    def _rounds(self, epoch: Epoch) -> Iterator[tuple[list[Any], list[int | None], bool]]:
        """Yield the batches of each round, how many more each process will get, and whether a round follows."""
        sampler, processes = self.given_sampler, self.channel.world_size
        iterable = isinstance(self.dataset, IterableDataset)
        batches = self._read(epoch) if iterable else self._draw(epoch, looks_ahead=False)
        if not iterable and length_is_exact(sampler):
            total = share_length(sampler, epoch.start)
            while taken := list(itertools.islice(batches, processes)):
                total -= len(taken)
                epoch.given += 1
                epoch.finished = total == 0
                lefts: list[int | None] = [-(-(total - r) // processes) for r in range(len(taken))]
                yield taken, lefts, total > 0
            return
        taken = self._round(batches)
        while taken:
            following = self._round(batches)
            epoch.given += 1
            for batch in taken:
                if isinstance(batch, Read):
                    epoch.take(batch)
            if not following:
                epoch.finished = not iterable
                if iterable:
                    self.order.end(epoch)
            yield taken, [None if r < len(following) else 0 for r in range(len(taken))], bool(following)
            taken = following

    def _round(self, batches: Iterator[Any]) -> list[Any]:
        """Read one batch for each process; fewer at the end, or none if incomplete rounds are left out."""
        taken = list(itertools.islice(batches, self.channel.world_size))
        incomplete = len(taken) < self.channel.world_size
        return [] if incomplete and getattr(self.dataset, "drop_last", False) else taken
