"""Every sample goes where the documented semantics say, for any lengths and numbers of processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from torchport.data.iterable import IterableDatasetShard
from torchport.data.loader import skip_first_batches
from torchport.data.samplers import BatchSamplerShard, SeedableRandomSampler
from torchport.errors import ConfigurationError

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
