"""Loaders that two processes share. Each `check_...` asserts; the outcome of each is written down."""

import warnings

import pytest
import torch
from checks import run_checks
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torchport import Accelerator, DataLoaderConfiguration, skip_first_batches
from torchport.errors import CheckpointError, ConfigurationError, DataLoadingError
from torchport.state import AcceleratorState
from torchport.utils import gather_object, set_seed

NUMBERS = TensorDataset(torch.arange(10))


def fresh(**settings) -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(**settings)


def seen(loader) -> list[int]:
    """Return what all processes have seen."""
    mine = []
    for batch in loader:
        mine += (batch if isinstance(batch, torch.Tensor) else batch[0]).flatten().tolist()
    return gather_object(mine)


def metrics(accelerator, loader) -> list[int]:
    found = []
    for batch in loader:
        tensor = batch if isinstance(batch, torch.Tensor) else batch[0]
        found += accelerator.gather_for_metrics(tensor).tolist()
    return found


def check_every_random_sampler_draws_one_order(folder):
    accelerator = fresh()
    for sampler in (
        RandomSampler(NUMBERS),
        SubsetRandomSampler(range(10)),
        WeightedRandomSampler(torch.ones(10), 10, replacement=False),
    ):
        set_seed(1, device_specific=True)
        loader = accelerator.prepare(DataLoader(NUMBERS, batch_size=1, sampler=sampler))
        orders = [seen(loader), seen(loader)]
        assert [sorted(order) for order in orders] == [list(range(10))] * 2, type(sampler)
        assert orders[0] != orders[1]


def check_generators_of_the_user_are_synchronized(folder):
    accelerator = fresh(rng_types=[])
    generator = torch.Generator().manual_seed(100 + accelerator.process_index)
    loader = accelerator.prepare(DataLoader(NUMBERS, batch_size=1, shuffle=True, generator=generator))
    assert loader.synchronized_generator is generator
    assert sorted(seen(loader)) == list(range(10))


class Unordered(IterableDataset):
    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        yield from torch.randperm(10, generator=self.generator)


def check_generators_of_iterable_sets_are_synchronized(folder):
    accelerator = fresh()
    for generator in (torch.Generator().manual_seed(100 + accelerator.process_index), None):
        set_seed(1, device_specific=True)
        loader = accelerator.prepare(DataLoader(Unordered(generator), batch_size=1))
        assert [sorted(seen(loader)) for _ in range(2)] == [list(range(10))] * 2


def check_a_seedable_order_takes_the_main_process_s_seed(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(1, device_specific=True)
    loader = accelerator.prepare(DataLoader(NUMBERS, batch_size=1, shuffle=True))
    assert sorted(seen(loader)) == list(range(10))


def check_a_distributed_sampler_is_not_shared_out_again(folder):
    accelerator = fresh()
    loader = DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS))
    with pytest.raises(ConfigurationError, match="leave the DistributedSampler out"):
        accelerator.prepare(loader)


class Whole(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.arange(4) + 4 * index


def check_whole_batches_are_counted_by_samples(folder):
    accelerator = fresh()
    assert metrics(accelerator, accelerator.prepare(DataLoader(Whole(), batch_size=None))) == list(range(12))
    listed = BatchSampler(RandomSampler(NUMBERS), 4, False)
    loader = accelerator.prepare(DataLoader(NUMBERS, sampler=listed, batch_size=None))
    assert sorted(metrics(accelerator, loader)) == list(range(10))
    uneven = fresh(dataloader_config=DataLoaderConfiguration(even_batches=False))
    loader = uneven.prepare(DataLoader(Whole(), batch_size=None))
    assert len(loader) == len(list(loader)) == (2 if uneven.process_index == 0 else 1)


class Divided(IterableDataset):
    """Divides its samples over the workers, as PyTorch's documentation shows."""

    def __iter__(self):
        info = get_worker_info()
        yield from torch.arange(11) if info is None else torch.arange(info.id, 11, info.num_workers)


def check_workers_of_iterable_sets_give_each_sample_once(folder):
    accelerator = fresh()
    for workers, size in ((0, 2), (1, 2), (2, 2), (2, 1), (2, 3)):
        loader = accelerator.prepare(DataLoader(Divided(), batch_size=size, num_workers=workers))
        assert sorted(metrics(accelerator, loader)) == list(range(11)), (workers, size)
        assert loader.total_batch_size == 2 * size


class Bucketed:
    """Batches of two, but for the second."""

    batch_size, drop_last = 2, False
    batches = ([0, 1], [2], [3, 4], [5, 6], [7, 8], [9])

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def check_a_short_batch_amid_an_epoch_ends_nothing(folder):
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(NUMBERS, batch_sampler=Bucketed()))
    mine = [batch.tolist() for (batch,) in loader]
    assert mine == ([[0, 1], [3, 4], [7, 8]] if accelerator.process_index == 0 else [[2], [5, 6], [9, 0]])
    assert loader.end_of_dataloader
    assert loader.remainder == 3


def check_a_split_loader_knows_its_uneven_length(folder):
    configuration = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = fresh(dataloader_config=configuration)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(5)), batch_size=4))
    mine = [(batch.tolist(), loader.end_of_dataloader) for (batch,) in loader]
    assert len(loader) == len(mine)
    assert mine == ([([0, 1], False), ([4], True)] if accelerator.process_index == 0 else [([2, 3], True)])


def check_a_run_saved_amid_an_epoch_goes_on(folder):
    numbers = TensorDataset(torch.arange(24))

    def prepared(seed):
        accelerator = fresh()
        set_seed(seed, device_specific=True)
        return accelerator, accelerator.prepare(DataLoader(numbers, batch_size=2, shuffle=True))

    accelerator, loader = prepared(1)
    expected = []
    for number, (batch,) in enumerate(loader):
        expected.append(batch.tolist())
        if number == 1:
            accelerator.save_state(folder / "amid")
    following = seen(loader)
    accelerator, loader = prepared(50)
    accelerator.load_state(folder / "amid")
    assert [batch.tolist() for (batch,) in skip_first_batches(loader, 2)] == expected[2:]
    assert seen(loader) == following
    accelerator.load_state(folder / "amid")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [batch.tolist() for (batch,) in loader] == expected[2:]
    told = ["it leaves out the first 2 batches that" in str(w.message) for w in told]
    assert told == [True] * accelerator.is_main_process


def check_joining_cannot_fill_up_batches_without_a_size(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(even_batches=False))
    model, loader = accelerator.prepare(
        torch.nn.Linear(1, 1), DataLoader(NUMBERS, batch_sampler=[[0], [1, 2], [3]])
    )
    with (
        pytest.raises(ConfigurationError, match="batch_size"),
        accelerator.join_uneven_inputs([model], even_batches=True),
    ):
        iter(loader.batch_sampler)
    assert loader.batch_sampler.even_batches is False


class Named(IterableDataset):
    """Tensors, texts and objects; counts what is read, and fails where it is told to."""

    def __init__(self, length=7, fails_at=None):
        self.length, self.fails_at, self.read = length, fails_at, 0

    def __iter__(self):
        for number in range(self.length):
            if number == self.fails_at:
                raise ValueError("a broken record")
            self.read += 1
            yield {"number": torch.tensor(number), "name": f"n{number}", "seen": {number}}


def listed(samples):
    """Make a batch with leaves that are no tensors."""
    return {
        "number": torch.stack([sample["number"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
        "seen": set().union(*(sample["seen"] for sample in samples)),
    }


def check_dispatched_batches_hold_anything(folder):
    for split, size in ((False, 2), (True, 4)):
        configuration = DataLoaderConfiguration(split_batches=split)
        accelerator = fresh(dataloader_config=configuration)
        dataset = Named()
        loader = accelerator.prepare(DataLoader(dataset, batch_size=size, collate_fn=listed))
        mine = [(batch["number"].tolist(), batch["name"], batch["seen"]) for batch in loader]
        shares = ([0, 1], [4, 5]) if accelerator.process_index == 0 else ([2, 3], [6, 0])
        assert mine == [(share, [f"n{n}" for n in share], set(share)) for share in shares]
        assert dataset.read == (7 if accelerator.is_main_process else 0)
        names = [name for b in loader for name in accelerator.gather_for_metrics(b["name"])]
        assert names == [f"n{n}" for n in range(7)]


def check_an_error_of_the_main_process_s_data_set_is_raised_on_all(folder):
    for workers in (0, 1):
        accelerator = fresh()
        plain = DataLoader(Named(fails_at=5), batch_size=1, collate_fn=listed, num_workers=workers)
        loader = iter(accelerator.prepare(plain))
        expected = ValueError if accelerator.is_main_process else DataLoadingError
        next(loader)
        with pytest.raises(expected, match="a broken record"):
            list(loader)
        accelerator.wait_for_everyone()


def check_a_dispatched_batch_that_cannot_be_pickled_is_an_error_on_all(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    plain = DataLoader(NUMBERS, batch_size=1, collate_fn=lambda _: {"function": lambda: 1})
    loader = accelerator.prepare(plain)
    expected = Exception if accelerator.is_main_process else DataLoadingError
    with pytest.raises(expected, match=r"check_a_dispatched_batch.*<lambda>"):
        list(loader)
    accelerator.wait_for_everyone()


def check_a_function_of_the_user_cuts_dispatched_batches(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    asked = []

    def reversed_slice(batch, part, process_index, num_processes):
        asked.append((part, process_index, num_processes))
        return [tensor.flip(0)[part] for tensor in batch]

    loader = accelerator.prepare_data_loader(
        DataLoader(NUMBERS, batch_size=5), slice_fn_for_dispatch=reversed_slice
    )
    mine = [batch.tolist() for (batch,) in loader]
    assert mine == ([[9, 8, 7, 6, 5]] if accelerator.process_index == 0 else [[4, 3, 2, 1, 0]])
    main = [(slice(0, 5), 0, 2), (slice(5, 10), 1, 2)]
    assert asked == (main if accelerator.is_main_process else [])


def check_processes_that_all_read_are_told_of(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loader = accelerator.prepare(DataLoader(Divided(), batch_size=2))
    found = [str(w.message) for w in told if "reads all of Divided" in str(w.message)]
    assert len(found) == (1 if accelerator.is_main_process else 0)
    assert metrics(accelerator, loader) == list(range(11))


class Files(IterableDataset):
    """Reads files, which it divides over processes as data sets of Hugging Face do; counts what is read."""

    def __init__(self, files, fails_at=None):
        self.files, self.fails_at, self.read, self.shuffled_by = files, fails_at, 0, 0
        self.parts = []

    @property
    def num_shards(self):
        return len(self.files)

    def shard(self, num_shards, index):
        part = type(self)(self.files[index::num_shards], self.fails_at)
        self.parts.append(part)
        return part

    def set_epoch(self, epoch):
        self.shuffled_by = epoch

    def samples(self):
        return [number + 100 * self.shuffled_by for file in self.files for number in file]

    def __iter__(self):
        for number in self.samples():
            if number == self.fails_at:
                raise ValueError("a broken record")
            self.read += 1
            yield number


class StatefulFiles(Files):
    begin = 0
    state_fails = None

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for place, number in enumerate(self.samples()[begin:], start=begin + 1):
            self.read += 1
            self.begin = place
            yield number
        self.begin = 0

    def state_dict(self):
        if self.state_fails is OSError:
            raise OSError("the position cannot be read")
        return {"begin": self.begin if self.state_fails is None else lambda: self.begin}

    def load_state_dict(self, state):
        self.begin = state["begin"]


UNEVEN = [[0, 1, 2, 3, 4], [5], [6, 7], [], [8, 9], []]
"""For two processes: nine samples and one."""


def check_a_set_that_divides_itself_is_read_once_in_total(folder):
    for dispatch in (None, False):
        accelerator = fresh(dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
        main = accelerator.is_main_process
        dataset = Files(UNEVEN)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = accelerator.prepare(DataLoader(dataset, batch_size=2))
        mine = [(b.tolist(), loader.real_samples, loader.end_of_dataloader) for b in loader]
        first, second = [0, 1], [5, 5]
        every = [[first, second], [[2, 3]] * 2, [[4, 6]] * 2, [[7, 8]] * 2, [[9, 0]] * 2]
        real = [(2, 1), (2, 0), (2, 0), (2, 0), (1, 0)]
        here = accelerator.process_index
        assert mine == [(b[here], r, n == 4) for n, (b, r) in enumerate(zip(every, real, strict=True))]
        assert dataset.read == 0
        assert dataset.parts[0].read == (9 if main else 1)
        assert metrics(accelerator, loader) == [0, 1, 5, 2, 3, 4, 6, 7, 8, 9]
        assert loader.total_batch_size == 4
        loader.set_epoch(1)
        assert sorted(metrics(accelerator, loader)) == list(range(100, 110))


def check_parts_of_a_set_take_split_batches_workers_and_no_samples(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = accelerator.prepare(DataLoader(Files([[0, 1, 2], [3, 4]]), batch_size=4))
    assert metrics(accelerator, loader) == [0, 1, 3, 4, 2]
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(Files([[0, 1, 2], []]), batch_size=2))
    assert metrics(accelerator, loader) == [0, 1, 2]
    loader = accelerator.prepare(DataLoader(Files(UNEVEN), batch_size=2, num_workers=1))
    assert metrics(accelerator, loader) == metrics(accelerator, loader) == [0, 1, 5, 2, 3, 4, 6, 7, 8, 9]
    loader = accelerator.prepare(
        DataLoader(Files([[0, 1, 2, 3, 4], [5, 6, 7]]), batch_size=2, drop_last=True)
    )
    assert metrics(accelerator, loader) == [0, 1, 5, 6]
    for files in ([[0, 1, 2]], []):  # too few to divide: the main process reads
        loader = accelerator.prepare(DataLoader(Files(files), batch_size=2))
        assert metrics(accelerator, loader) == [n for file in files for n in file]
        assert hasattr(loader, "channel")


def check_training_on_parts_of_different_lengths_ends_on_all(folder):
    accelerator = fresh()
    model, loader = accelerator.prepare(torch.nn.Linear(1, 1), DataLoader(Files(UNEVEN), batch_size=2))
    for batch in loader:
        accelerator.backward(model(batch.float()[:, None]).mean())
    mean = torch.tensor([0, 1, 5, 5, *[2, 3, 4, 6, 7, 8, 9, 0] * 2], dtype=torch.float).sum() / 4
    assert model.module.weight.grad.item() == pytest.approx(float(mean))


def check_an_error_of_one_part_is_raised_on_all(folder):
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(Files([[0, 1, 2], [3, 4, 5]], fails_at=5), batch_size=1))
    with pytest.raises(DataLoadingError if accelerator.is_main_process else ValueError) as raised:
        list(loader)
    assert ("rank 1" if accelerator.is_main_process else "broken record") in str(raised.value)


def check_a_part_that_cannot_say_where_it_stands_is_an_error_on_all(folder):
    accelerator = fresh()
    dataset = StatefulFiles(UNEVEN)
    loader = accelerator.prepare(DataLoader(dataset, batch_size=2))
    for fails, reason in ((OSError, "the position cannot be read"), ("pickling", "lambda")):
        dataset.parts[0].state_fails = None if accelerator.is_main_process else fails
        with pytest.raises(Exception) as raised:
            loader.order_state()
        if accelerator.is_main_process:
            assert isinstance(raised.value, DataLoadingError)
            reason = "rank 1 could not say where its part stands"
        assert reason in str(raised.value)
        with pytest.raises(CheckpointError, match="rank 1 could not write"):
            accelerator.save_state(folder / "unreadable")
    dataset.parts[0].state_fails = None
    assert len(loader.order_state()["parts"]) == 2


def check_parts_of_a_set_go_on_where_each_stood(folder):
    for kind, workers in ((Files, 0), (StatefulFiles, 0), (StatefulFiles, 1)):

        def prepared():
            accelerator = fresh()
            dataset = kind(UNEVEN)  # noqa: B023
            return accelerator, dataset, accelerator.prepare(DataLoader(dataset, 2, num_workers=workers))  # noqa: B023

        accelerator, _, loader = prepared()
        expected = []
        for number, batch in enumerate(loader):
            expected.append((batch.tolist(), loader.real_samples))
            if number in (0, 2):
                accelerator.save_state(folder / f"parts{kind.__name__}{workers}{number}")
        for number in (0, 2):
            accelerator, dataset, loader = prepared()
            accelerator.load_state(folder / f"parts{kind.__name__}{workers}{number}")
            gone_on = [(batch.tolist(), loader.real_samples) for batch in loader]
            assert gone_on == expected[number + 1 :], (kind, workers, number)
            if kind is StatefulFiles and not workers and accelerator.is_main_process:
                assert dataset.parts[0].read == 9 - 2 * (number + 1) + 2  # two to fill up the last round
            assert [batch.tolist() for batch in loader] == [batch for batch, _ in expected]
    configuration = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = fresh(dataloader_config=configuration)
    accelerator.prepare(DataLoader(StatefulFiles(UNEVEN), batch_size=2))
    with pytest.raises(CheckpointError, match="2 parts then, none now"):
        accelerator.load_state(folder / "partsStatefulFiles00")


if __name__ == "__main__":
    run_checks(dict(globals()))
