"""Every sample goes where the documented semantics say, for any lengths and numbers of processes."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)
from torchport.data.iterable import IterableDatasetShard
from torchport.data.prepare import prepare_data_loader, skip_first_batches
from torchport.data.samplers import BatchSamplerShard, SeedableRandomSampler
from torchport.errors import ConfigurationError
from torchport.ops.packing import pack, unpack

LENGTHS = st.integers(0, 50)
SIZES = st.integers(1, 7)
PROCESSES = st.integers(1, 4)


def shards(length, size, processes, drop_last, split=False, even=True):
    batches = [BatchSampler(SequentialSampler(range(length)), size, drop_last) for _ in range(processes)]
    return [BatchSamplerShard(b, processes, i, split, even) for i, b in enumerate(batches)]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, SIZES, PROCESSES, st.booleans())
def test_even_batches_give_every_process_as_much_and_each_sample_in_order(length, size, processes, drop_last):
    samplers = shards(length, size, processes, drop_last)
    taken = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in taken] == [len(sampler) for sampler in samplers]
    assert len({len(batches) for batches in taken}) == 1
    assert all(len(batch) == size for batches in taken for batch in batches)
    gathered = []
    for number, turn in enumerate(zip(*taken, strict=True)):
        samples = [sample for batch in turn for sample in batch]
        last = number == len(taken[0]) - 1
        gathered += samples[: samplers[0].remainder] if last and samplers[0].remainder > 0 else samples
    kept = length // (size * processes) * size * processes if drop_last else length
    assert gathered == list(range(kept))
    assert len({sampler.remainder for sampler in samplers}) == 1


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SIZES, PROCESSES)
def test_uneven_batches_give_each_sample_once(length, size, processes):
    samplers = shards(length, size, processes, drop_last=False, even=False)
    taken = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in taken] == [len(sampler) for sampler in samplers]
    assert sum(map(len, taken)) == math.ceil(length / size)
    assert sorted(s for batches in taken for batch in batches for s in batch) == list(range(length))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SIZES, PROCESSES, st.booleans())
def test_split_batches_cut_each_batch_in_order(length, parts, processes, drop_last):
    size = parts * processes
    samplers = shards(length, size, processes, drop_last, split=True)
    taken = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in taken] == [len(sampler) for sampler in samplers]
    gathered = []
    for number, turn in enumerate(zip(*taken, strict=True)):
        samples = [sample for part in turn for sample in part]
        assert [len(part) for part in turn] == [parts] * processes
        last = number == len(taken[0]) - 1
        gathered += samples[: samplers[0].remainder] if last and samplers[0].remainder > 0 else samples
    assert gathered == list(range(length // size * size if drop_last else length))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SIZES, PROCESSES, st.booleans())
def test_iterable_sets_take_turns(length, size, processes, drop_last):
    sets = [IterableDatasetShard(range(length), size, drop_last, processes, i) for i in range(processes)]
    taken = [list(part) for part in sets]
    assert [len(samples) for samples in taken] == [len(part) for part in sets]
    gathered = []
    for start in range(0, len(taken[0]), size):
        turn = [sample for samples in taken for sample in samples[start : start + size]]
        last = start + size >= len(taken[0])
        gathered += turn[: sets[0].remainder] if last and sets[0].remainder > 0 else turn
    whole = size * processes
    assert gathered == list(range(length // whole * whole if drop_last else length))


def test_batches_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigurationError, match="multiple of 2"):
        shards(10, 3, 2, drop_last=False, split=True)


def test_batches_of_no_fixed_size_cannot_be_filled_up():
    with pytest.raises(ConfigurationError, match="even_batches=False"):
        BatchSamplerShard([[0], [1, 2]], 2, 0)
    assert list(BatchSamplerShard([[0], [1, 2], [3]], 2, 0, even_batches=False)) == [[0], [3]]


def test_a_seedable_order_depends_on_seed_and_epoch_alone():
    def order(epoch):
        torch.manual_seed(epoch * 17)
        sampler = SeedableRandomSampler(range(20), data_seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0) != order(1)
    sampler = SeedableRandomSampler(range(20), data_seed=3)
    assert [list(sampler), list(sampler)] == [order(0), order(1)]


def test_skipped_batches_are_not_read():
    read = []

    class Recording(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = skip_first_batches(DataLoader(Recording(torch.arange(10)), batch_size=3), 2)
    assert [batch.tolist() for (batch,) in loader] == [[6, 7, 8], [9]]
    assert read == [6, 7, 8, 9]
    assert len(loader) == 2


class Recorded:
    """Stands for the channel between processes: what rank 0 sends is kept, and received by each rank in turn."""

    def __init__(self, world_size):
        self.rank, self.world_size = 0, world_size
        self.sent = []

    def pack(self, messages):
        return [pack(message) for message in messages]

    def send(self, packed):
        self.sent.append(list(map(unpack, packed)))

    def receive(self):
        return self.sent.pop(0)[self.rank]

    def of(self, rank):
        other = Recorded(self.world_size)
        other.rank, other.sent = rank, list(self.sent)
        return other


class Counted(IterableDataset):
    """An iterable data set that counts what is read."""

    def __init__(self, length):
        self.length, self.read = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        for number in range(self.length):
            self.read += 1
            yield number, f"sample {number}"


class CountedMap(Dataset):
    def __init__(self, length):
        self.length, self.read = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read += 1
        return index, f"sample {index}"


class Simulated:
    """Processes that have prepared the same loader, one after the other in this process."""

    def __init__(self, make, processes, **settings):
        self.loaders, self.rounds, channel = [], [], Recorded(processes)
        for rank in range(processes):
            given = channel if rank == 0 else channel.of(rank)
            loader = prepare_data_loader(
                make(), num_processes=processes, process_index=rank, channel=given, **settings
            )
            self.loaders.append(loader)
            self.rounds.append(list(self._iterate(loader)))

    @staticmethod
    def _iterate(loader):
        for numbers, names in loader:
            assert [f"sample {number}" for number in numbers.tolist()] == list(names)
            real = loader.real_samples or loader.remainder
            yield numbers.tolist(), real, loader.end_of_dataloader

    def gathered(self):
        """What `gather_for_metrics` would return in each round, on the first process."""
        kept = []
        for turn in itertools.zip_longest(*self.rounds):
            batches, reals = [step[0] for step in turn if step], {step[1] for step in turn if step}
            assert len(reals) == 1
            real = reals.pop()
            if isinstance(real, tuple):
                kept += [sample for batch, n in zip(batches, real, strict=True) for sample in batch[:n]]
            else:
                kept += [sample for batch in batches for sample in batch][: real if real > 0 else None]
        return kept

    def check_ends(self):
        for mine in self.rounds:
            assert [end for _, _, end in mine] == [False] * (len(mine) - 1) + [True] * bool(mine)


@settings(max_examples=150, deadline=None)
@given(
    length=LENGTHS, size=SIZES, processes=PROCESSES, drop_last=st.booleans(), split=st.booleans(),
    even=st.booleans(), dispatch=st.booleans(), iterable=st.booleans(),
)  # fmt: skip
def test_every_way_of_sharing_gives_each_sample_once_and_in_order(
    length, size, processes, drop_last, split, even, dispatch, iterable
):
    whole = size * processes
    batch_size = whole if split else size
    sets = []

    def make():
        sets.append(Counted(length) if iterable else CountedMap(length))
        return DataLoader(sets[-1], batch_size=batch_size, drop_last=drop_last)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = Simulated(make, processes, split_batches=split, even_batches=even, dispatch_batches=dispatch)
    told.check_ends()
    rounds = told.rounds
    for loader, mine in zip(told.loaders, rounds, strict=True):
        assert len(loader) == len(mine)
    if even and processes > 1:
        assert len({len(mine) for mine in rounds}) == 1
        assert all(len(batch) == size for mine in rounds for batch, _, _ in mine)
    kept = length // whole * whole if drop_last else length
    assert told.gathered() == list(range(kept))
    if dispatch and processes > 1:
        assert [data.read for data in sets[1:]] == [0] * (processes - 1)
        assert sets[0].read <= length + whole
