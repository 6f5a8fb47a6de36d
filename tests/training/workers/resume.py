"""Runs that are saved amid an epoch, and go on in other processes.

    resume.py FOLDER save CHECKPOINTS      train every case, save it amid an epoch, train on
    resume.py FOLDER load CHECKPOINTS      load every case of as many processes, train on
    resume.py FOLDER elsewhere CHECKPOINTS WORLD    load the cases that WORLD processes saved, in another number

Each process writes to FOLDER what it saw behind the checkpoint: samples, weights, and how many samples it read.
"""

import gc
import itertools
import json
import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchport import Accelerator, DataLoaderConfiguration, PartialState
from torchport.utils import set_seed

LENGTH, BATCH, SAVED_AT, EPOCHS = 26, 3, 2, 2
KINDS, WORKERS, WAYS = ("map", "iterable", "stateful"), (0, 1, 4), ("shard", "dispatch")
GLOBAL = 6  # samples of a round, where the number of processes changes
ORDERS = ("sequential", "shuffled", "generator", "seedable")


class Reads:
    """Counts the samples that are read, in workers too."""

    def __init__(self):
        self.counter = multiprocessing.Value("i", 0)

    def sample(self, number):
        with self.counter:
            self.counter.value += 1
        return torch.tensor([float(number)])


class Numbers(Reads, Dataset):
    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        return self.sample(index)


def of_this_worker(order):
    info = get_worker_info()
    return order if info is None else order[info.id :: info.num_workers]


class Drawn(Reads, IterableDataset):
    """An order of its own, and no state."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        for number in of_this_worker(torch.randperm(LENGTH, generator=self.generator).tolist()):
            yield self.sample(number)


class Stateful(Reads, IterableDataset):
    """Says where it stands, and goes there."""

    def __init__(self, seed):
        super().__init__()
        self.state = {"seed": seed, "epoch": 0, "position": 0}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.state["seed"] + self.state["epoch"])
        order = of_this_worker(torch.randperm(LENGTH, generator=generator).tolist())
        while self.state["position"] < len(order):
            self.state["position"] += 1
            yield self.sample(order[self.state["position"] - 1])
        self.state["epoch"] += 1
        self.state["position"] = 0


class Run:
    """One case, prepared."""

    def __init__(self, seed, loader, **configuration):
        gc.collect()  # of earlier cases nothing is left that a worker, being forked, could destroy
        self.accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**configuration))
        set_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.counter = loader.dataset.counter

    def epoch(self):
        """Train; yield the samples of each batch."""
        for batch in self.loader:
            self.optimizer.zero_grad()
            self.accelerator.backward(self.model(batch).square().mean())
            self.optimizer.step()
            yield batch.flatten().int().tolist()

    def rest(self, amid=None):
        """Train to the end; return what is to be the same with and without interruption."""
        self.counter.value = 0
        seen = [list(self.epoch() if amid is None else amid)]
        read = self.counter.value
        seen += [list(self.epoch()) for _ in range(EPOCHS - 1)]
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return {"seen": seen, "read": read, "weights": weights.tolist()}


def case(kind, workers, way, seed):
    dataset = Numbers() if kind == "map" else Drawn(seed) if kind == "iterable" else Stateful(seed)
    settings = {"shuffle": True} if kind == "map" else {}
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, **settings)
    return Run(seed, loader, dispatch_batches=way == "dispatch")


def reordered(order, seed):
    settings = {"shuffle": order != "sequential"}
    if order == "generator":
        settings["generator"] = torch.Generator().manual_seed(seed)
    size = GLOBAL // PartialState().num_processes
    loader = DataLoader(Numbers(), batch_size=size, **settings)
    return Run(seed, loader, use_seedable_sampler=order == "seedable")


def saved(run, folder):
    amid = run.epoch()
    for _ in range(SAVED_AT):
        next(amid)
    run.accelerator.save_state(folder)
    return run.rest(amid)


def loaded(run, folder):
    run.accelerator.load_state(folder)
    return run.rest()


def main():
    folder, task, checkpoints = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    world = PartialState().num_processes
    outcomes = {}
    if task == "elsewhere":
        for order in ORDERS:
            run = reordered(order, seed=9)
            outcomes[order] = loaded(run, checkpoints / f"{sys.argv[4]}-{order}")
    else:
        seed, do = (1, saved) if task == "save" else (9, loaded)
        for kind, workers, way in itertools.product(KINDS, WORKERS, WAYS[: 1 if world == 1 else 2]):
            name = f"{kind}-{workers}-{way}"
            outcomes[name] = do(case(kind, workers, way, seed), checkpoints / f"{world}-{name}")
        for order in ORDERS:
            outcomes[order] = do(reordered(order, seed), checkpoints / f"{world}-{order}")
    state = PartialState()
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(outcomes))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
