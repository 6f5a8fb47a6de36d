"""Loaders as one process sees them, and, with `workers/loaders.py`, as two processes share them out."""

import gc
import itertools
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from jobs import checks_of
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchport import Accelerator, DataLoaderConfiguration, skip_first_batches
from torchport.data.prepare import prepare_data_loader
from torchport.data.samplers import BatchSamplerShard
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.state import AcceleratorState

NUMBERS = TensorDataset(torch.arange(12))
SOURCE = Path(__file__).parent / "workers" / "loaders.py"
CHECKS = checks_of(SOURCE)


@pytest.fixture(autouse=True)
def _end_of_run():
    yield
    AcceleratorState._reset_state()
    gc.collect()  # ends workers that persist


def fresh(**settings):
    AcceleratorState._reset_state()
    return Accelerator(**settings)


def batches(loader):
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch[0].tolist() for batch in loader]


class Claiming(BatchSampler):
    """Six batches, whatever it says."""

    def __init__(self, claim):
        super().__init__(SequentialSampler(NUMBERS), 2, False)
        self.claim = claim

    def __iter__(self):
        return super().__iter__()

    def __len__(self):
        if self.claim is None:
            raise TypeError("no length")
        return self.claim


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("claim", [3, 6, 9, None])
def test_the_last_batch_is_known_whatever_length_a_sampler_claims(claim, workers):
    loader = fresh().prepare(DataLoader(NUMBERS, batch_sampler=Claiming(claim), num_workers=workers))
    seen = [(batch.tolist(), loader.end_of_dataloader) for (batch,) in loader]
    assert seen == [([i, i + 1], i == 10) for i in range(0, 12, 2)]
    assert loader.batches_left == 0


def test_windows_of_a_sampler_of_unknown_length_have_their_size():
    accelerator = fresh(gradient_accumulation_steps=4)
    weight = torch.nn.Linear(1, 1, bias=False)
    model, loader = accelerator.prepare(weight, DataLoader(NUMBERS, batch_sampler=Claiming(2)))
    gradients = []
    for _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).mean())
            if accelerator.sync_gradients:
                gradients.append(weight.weight.grad.item())
                weight.weight.grad = None
    assert gradients == [1.0, 1.0]


def test_a_sampler_without_a_length_works_as_in_plain_pytorch():
    class Endless(Sampler):
        def __iter__(self):
            return iter(range(4))

    loader = fresh().prepare(DataLoader(NUMBERS, sampler=Endless(), batch_size=2))
    assert batches(loader) == [[0, 1], [2, 3]]
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"shuffle": True},
        lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(4)},
        lambda: {"sampler": SubsetRandomSampler(range(12))},
        lambda: {"sampler": WeightedRandomSampler(torch.ones(12), 12, replacement=False)},
        lambda: {"sampler": RandomSampler(NUMBERS, replacement=True)},
    ],
    ids=["shuffle", "generator", "subset", "weighted", "replacement"],
)
def test_one_process_keeps_the_order_and_the_draws_of_plain_pytorch(make, workers):
    torch.manual_seed(3)
    plain = DataLoader(NUMBERS, batch_size=2, num_workers=workers, **make())
    expected = [batches(plain), batches(plain)]
    after = torch.rand(1)
    torch.manual_seed(3)
    prepared = fresh().prepare(DataLoader(NUMBERS, batch_size=2, num_workers=workers, **make()))
    assert [batches(prepared), batches(prepared)] == expected
    assert torch.equal(torch.rand(1), after)


def test_augmentation_draws_as_in_plain_pytorch_whatever_length_is_claimed():
    class Noisy(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.rand(1)

    def draws(loader):
        torch.manual_seed(3)
        return [(batch.flatten().tolist(), torch.rand(1).item()) for batch in loader]

    plain = DataLoader(Noisy(), batch_sampler=Claiming(6))
    assert draws(fresh().prepare(DataLoader(Noisy(), batch_sampler=Claiming(6)))) == draws(plain)


class Shuffling(Sampler):
    """A user's sampler that draws from PyTorch's global generator."""

    def __len__(self):
        return 12

    def __iter__(self):
        return iter(torch.randperm(12).tolist())


class Unordered(IterableDataset):
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        yield from torch.randperm(12, generator=self.generator)


ORDERS = {
    "shuffle": (lambda seed: (NUMBERS, {"shuffle": True}), {}),
    "workers": (lambda seed: (NUMBERS, {"shuffle": True, "num_workers": 1}), {}),
    "persistent workers": (
        lambda seed: (NUMBERS, {"shuffle": True, "num_workers": 1, "persistent_workers": True}),
        {},
    ),
    "generator": (
        lambda seed: (NUMBERS, {"shuffle": True, "generator": torch.Generator().manual_seed(seed)}),
        {},
    ),
    "seedable": (
        lambda seed: (NUMBERS, {"shuffle": True}),
        {"use_seedable_sampler": True, "data_seed": 1},
    ),
    "own sampler": (lambda seed: (NUMBERS, {"sampler": Shuffling()}), {}),
    "iterable": (lambda seed: (Unordered(seed), {}), {}),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_saved_amid_an_epoch_goes_on_with_the_batches_it_had_left(order, tmp_path):
    make, configuration = ORDERS[order]

    def loader(accelerator, seed):
        dataset, settings = make(seed)
        return accelerator.prepare(DataLoader(dataset, batch_size=2, **settings))

    def run():
        return fresh(dataloader_config=DataLoaderConfiguration(**configuration))

    torch.manual_seed(5)
    accelerator = run()
    interrupted = loader(accelerator, 4)
    batches(interrupted)
    expected, draws = [], []
    for number, batch in enumerate(interrupted):
        expected.append(batches([batch])[0])
        if number == 1:
            accelerator.save_state(tmp_path / "state")
        if number >= 2:
            draws.append(torch.rand(1).item())
    following = batches(interrupted)

    torch.manual_seed(99)
    accelerator = run()
    resumed = loader(accelerator, 77)
    accelerator.load_state(tmp_path / "state")
    again, drawn = [], []
    for batch in skip_first_batches(resumed, 2):
        again.append(batches([batch])[0])
        drawn.append(torch.rand(1).item())
    assert again == expected[2:]
    assert drawn == draws
    assert batches(resumed) == following

    accelerator = run()
    resumed = loader(accelerator, 78)
    accelerator.load_state(tmp_path / "state")
    assert batches(resumed) == expected[2:]


def test_a_run_saved_at_the_last_batch_goes_on_with_the_next_epoch(tmp_path):
    accelerator = fresh()
    generator = torch.Generator().manual_seed(1)
    loader = accelerator.prepare(DataLoader(NUMBERS, batch_size=2, shuffle=True, generator=generator))
    for _ in loader:
        if loader.end_of_dataloader:
            accelerator.save_state(tmp_path / "state")
    following = batches(loader)
    accelerator.load_state(tmp_path / "state")
    assert batches(loader) == following


def test_an_epoch_that_is_broken_off_counts_for_a_seedable_order():
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    loader = fresh(dataloader_config=configuration).prepare(DataLoader(NUMBERS, batch_size=12, shuffle=True))
    whole = [batches(loader)[0] for _ in range(3)]
    loader.set_epoch(0)
    broken = [next(iter(loader))[0].tolist() for _ in range(3)]
    assert broken == whole
    assert whole[0] != whole[1]


def test_set_epoch_reaches_every_sampler_and_the_data_set_once():
    told = []

    class Telling:
        def __init__(self, name):
            self.name = name

        def set_epoch(self, epoch):
            told.append((self.name, epoch))

    class Told(Telling, Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

    class Drawn(Telling, Sampler):
        def __iter__(self):
            return iter(range(4))

    class Batched(Telling, BatchSampler):
        def __init__(self, name, sampler):
            super().__init__(name)
            self.sampler, self.batch_size, self.drop_last = sampler, 2, False

    dataset = Told("data set")
    plain = DataLoader(dataset, batch_sampler=Batched("batches", Drawn("samples")))
    for processes in (1, 2):
        share = prepare_data_loader(plain, num_processes=processes, process_index=0)
        for loader in (share, skip_first_batches(share, 1)):
            told.clear()
            loader.set_epoch(7)
            assert told == [("batches", 7), ("samples", 7), ("data set", 7)]


def test_a_sampler_of_batches_over_a_subset_works_without_a_batch_size():
    subset = Subset(NUMBERS, range(2, 10))
    plain = DataLoader(subset, sampler=BatchSampler(SequentialSampler(subset), 3, False), batch_size=None)
    expected = [[2, 3, 4], [5, 6, 7], [8, 9]]
    assert batches(plain) == expected
    assert batches(fresh().prepare(plain)) == expected
    assert batches(skip_first_batches(plain, 1)) == expected[1:]


def test_the_first_batches_of_a_loader_without_a_batch_size_can_be_skipped():
    loader = skip_first_batches(DataLoader(NUMBERS, batch_size=None), 9)
    assert [number.item() for (number,) in loader] == [9, 10, 11]
    assert len(loader) == 3


def test_batches_of_an_iterable_set_can_be_skipped_twice():
    loader = skip_first_batches(skip_first_batches(DataLoader(Unordered(0), batch_size=2), 1), 2)
    assert batches(loader) == batches(DataLoader(Unordered(0), batch_size=2))[3:]


class Doubling(DataLoader):
    def __iter__(self):
        for (batch,) in super().__iter__():
            yield (batch * 2,)


def test_a_loader_keeps_its_own_iteration_in_one_process():
    loader = fresh().prepare(Doubling(NUMBERS, batch_size=4))
    seen = [(batch.tolist(), loader.end_of_dataloader) for (batch,) in loader]
    assert seen == [([0, 2, 4, 6], False), ([8, 10, 12, 14], False), ([16, 18, 20, 22], True)]
    assert batches(skip_first_batches(loader, 2)) == [[16, 18, 20, 22]]
    assert batches(skip_first_batches(Doubling(NUMBERS, batch_size=4), 2)) == [[16, 18, 20, 22]]


def test_a_loader_with_its_own_iteration_is_not_shared_out():
    with pytest.raises(ConfigurationError, match=r"Doubling.__iter__"):
        prepare_data_loader(Doubling(NUMBERS, batch_size=4), num_processes=2, process_index=0)


def test_even_batches_cannot_be_asked_for_later_without_a_batch_size():
    share = BatchSamplerShard([[0], [1, 2], [3]], 2, 0, even_batches=False)
    share.even_batches = True
    with pytest.raises(ConfigurationError, match="batch_size"):
        iter(share)


@pytest.fixture(scope="module")
def outcomes(run_worker):
    # New interpreters: workers of loaders that are forked from forked processes crash now and then.
    return run_worker([sys.executable, "-m", "torchport", "launch", "--num-processes", "2"], SOURCE.name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    assert [rank.get(check, "not reached") for rank in outcomes] == ["passed", "passed"]


def windows(accelerator, model, loader, amid=lambda step: None):
    """Train; return for each micro-batch whether it ended its window."""
    ends = []
    for step, (_batch,) in enumerate(loader):
        amid(step)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).mean())
            ends.append(accelerator.sync_gradients)
    return ends


def test_a_side_iterator_that_is_held_open_ends_no_window():
    accelerator = fresh(gradient_accumulation_steps=3)
    training, validation = DataLoader(NUMBERS, batch_size=2), DataLoader(NUMBERS, batch_size=6)
    model, training, validation = accelerator.prepare(torch.nn.Linear(1, 1), training, validation)
    side = iter(validation)
    ends = windows(accelerator, model, training, lambda step: next(side) if step in (1, 3) else None)
    assert ends == [False, False, True] * 2
    assert accelerator.gradient_state.in_dataloader  # the side iterator is open still
    ends = windows(accelerator, model, training)
    assert ends == [False, False, True] * 2


def test_a_validation_loop_amid_training_ends_no_window():
    accelerator = fresh(gradient_accumulation_steps=3)
    model, training, validation = accelerator.prepare(
        torch.nn.Linear(1, 1), DataLoader(NUMBERS, batch_size=2), DataLoader(NUMBERS, batch_size=4)
    )
    ends = windows(accelerator, model, training, lambda step: batches(validation))
    assert ends == [False, False, True] * 2


class Stream(IterableDataset):
    """Numbers, with a state."""

    begin = 0

    def __iter__(self):
        while self.begin < 12:
            self.begin += 1
            yield self.begin - 1
        self.begin = 0

    def state_dict(self):
        return {"begin": self.begin}

    def load_state_dict(self, state):
        self.begin = state["begin"]


@pytest.mark.parametrize("dataset", [NUMBERS, Stream()], ids=["indices", "stream"])
def test_a_pass_that_goes_on_amid_an_epoch_tells_once_what_it_leaves_out(dataset):
    every = [[n, n + 1] for n in range(0, 12, 2)]
    loader = fresh().prepare(DataLoader(dataset, batch_size=2))
    amid = iter(loader)
    states = [(next(amid), loader.order_state())[1] for _ in range(2)]
    for given, (state, what) in enumerate(zip(states, ("batch", "2 batches"), strict=True), start=1):
        loader.load_order_state(state)
        with pytest.warns(UserWarning, match=f"{type(dataset).__name__} .* the first {what} that") as told:
            passes = batches(loader), batches(loader)
        assert passes == (every[given:], every)
        assert [warning.filename for warning in told] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for skipped in (0, given):
                loader.load_order_state(state)
                assert batches(skip_first_batches(loader, skipped)) == every[skipped:]
                assert batches(loader) == every


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_where_it_stood(workers, tmp_path):
    def run():
        torch.manual_seed(3)
        accelerator = fresh(dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
        generator = torch.Generator().manual_seed(1)
        plain = DataLoader(NUMBERS, batch_size=2, shuffle=True, generator=generator, num_workers=workers)
        return accelerator, accelerator.prepare(plain)

    from torchdata.stateful_dataloader import StatefulDataLoader

    accelerator, loader = run()
    assert isinstance(loader.reader, StatefulDataLoader)
    expected = []
    for number, (batch,) in enumerate(loader):
        expected.append(batch.tolist())
        if number == 1:
            accelerator.save_state(tmp_path / "state")
    following = [batches(loader), batches(loader)]
    for gone_on in (lambda loader: loader, lambda loader: skip_first_batches(loader, 2)):
        accelerator, loader = run()
        accelerator.load_state(tmp_path / "state")
        with warnings.catch_warnings(record=True) as told:
            assert batches(gone_on(loader)) == expected[2:]
        assert [str(w.message) for w in told if "it leaves out" in str(w.message)] == []
        assert [batches(loader), batches(loader)] == following
    assert sorted(itertools.chain(*expected)) == list(range(12))


def test_without_torchdata_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'torchdata>=0.8'"):
        prepare_data_loader(DataLoader(NUMBERS), use_stateful_dataloader=True)


class Repeating(IterableDataset):
    def __iter__(self):
        yield from range(6)


def test_a_set_that_ignores_its_workers_is_told_of_once(capfd, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: os.write(2, str(message).encode()))
    loader = fresh().prepare(DataLoader(Repeating(), batch_size=3, num_workers=2))
    assert sorted(itertools.chain(*batches_of(loader))) == sorted([*range(6)] * 2)
    told = capfd.readouterr().err
    assert "Repeating does not ask which worker it is in" in told
    assert "an epoch has each of them 2 times" in told
    batches_of(loader)
    assert "Repeating" not in capfd.readouterr().err


def batches_of(loader):
    return [batch.tolist() for batch in loader]


def test_persistent_workers_hear_of_a_new_epoch():
    class Epochs(Dataset):
        epoch = 0

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.epoch

        def set_epoch(self, epoch):
            self.epoch = epoch

    plain = DataLoader(Epochs(), batch_size=2, num_workers=1, persistent_workers=True)
    loader = fresh().prepare(plain)
    assert batches_of(loader) == [[0, 0]]
    loader.set_epoch(5)
    assert batches_of(loader) == [[5, 5]]
