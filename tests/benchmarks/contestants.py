"""The same training loop four times: written by hand, and with each library's public API.

All train one small model on the same batches. `check` proves that they do the same work: after the same number of
epochs their parameters are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

STEPS = 50
BATCH = 32  # samples per process

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name


class Contestant:
    """One way to write the loop: `epoch` runs it, step by step, `model` is what it trains, `gather` exchanges a tensor."""

    model: nn.Module

    def epoch(self) -> Iterator[None]:
        """Run one epoch of `STEPS` steps, pausing after each."""
        raise NotImplementedError

    def run(self) -> Iterator[None]:
        """Run epoch after epoch."""
        while True:
            yield from self.epoch()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes."""
        raise NotImplementedError


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any, TensorDataset]:
    """Make the model, its optimizer and scheduler, and the data of all processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)
    samples = STEPS * BATCH * world_size()
    data = TensorDataset(torch.randn(samples, 32), torch.randint(0, 10, (samples,)))
    return model, optimizer, scheduler, data


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class HandWritten(Contestant):
    """PyTorch alone."""

    def __init__(self) -> None:
        model, self.optimizer, self.scheduler, data = parts()
        sampler: DistributedSampler[Any] | None = None
        if world_size() > 1:
            model = nn.parallel.DistributedDataParallel(model)
            sampler = DistributedSampler(data, shuffle=False)
        self.model, self.loader = model, DataLoader(data, batch_size=BATCH, sampler=sampler)

    def epoch(self) -> Iterator[None]:
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        for inputs, labels in self.loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            yield

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty((tensor.shape[0] * dist.get_world_size(), *tensor.shape[1:]))
        _all_gather_single(gathered, tensor)
        return gathered


class Accelerated(Contestant):
    """The loop that Torchport and accelerate share word for word, with everything prepared.

    `split_batches` makes batches and scheduler mean what they mean in the hand-written loop: one batch over all
    processes for each step, and one step of the scheduler.
    """

    def __init__(self, accelerator: Any) -> None:
        model, optimizer, scheduler, data = parts()
        loader = DataLoader(data, batch_size=BATCH * world_size())
        self.accelerator = accelerator
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def epoch(self) -> Iterator[None]:
        accelerator, model = self.accelerator, self.model
        optimizer, scheduler = self.optimizer, self.scheduler
        for inputs, labels in self.loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
            yield

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = self.accelerator.gather(tensor)
        return gathered


def torchport() -> Contestant:
    from torchport import Accelerator
    from torchport.utils import DataLoaderConfiguration

    return Accelerated(Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True)))


def accelerate() -> Contestant:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerated(Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True)))


class Fabric(Contestant):
    """Lightning Fabric; it has no prepared scheduler."""

    def __init__(self) -> None:
        from lightning_fabric import Fabric

        processes = world_size()
        self.fabric = Fabric(
            accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto"
        )
        self.fabric.launch()
        model, optimizer, self.scheduler, data = parts()
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.loader = self.fabric.setup_dataloaders(DataLoader(data, batch_size=BATCH))

    def epoch(self) -> Iterator[None]:
        fabric, model, optimizer, scheduler = self.fabric, self.model, self.optimizer, self.scheduler
        for inputs, labels in self.loader:
            with fabric.no_backward_sync(model, enabled=False):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                fabric.backward(loss)
                optimizer.step()
                scheduler.step()
            yield

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = self.fabric.all_gather(tensor)
        return gathered.flatten(0, 1)


CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    "torch": HandWritten,
    "torchport": torchport,
    "accelerate": accelerate,
    "fabric": Fabric,
    "torch (again)": HandWritten,  # how far two equal loops are apart: what the figures cannot tell
}


class HandWrittenEngine(Contestant):
    """DeepSpeed alone, with ZeRO stage 2."""

    def __init__(self) -> None:
        import importlib

        import deepspeed

        # DeepSpeed would compile collectives of its own first; all contestants use the same process group
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        model, optimizer, self.scheduler, data = parts()
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        self.model = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=False)
        self.loader = DataLoader(data, batch_size=BATCH, sampler=sampler)

    def epoch(self) -> Iterator[None]:
        engine, scheduler = self.model, self.scheduler
        for inputs, labels in self.loader:
            loss = cross_entropy(engine(inputs), labels)
            engine.backward(loss)
            engine.step()
            scheduler.step()
            yield


def torchport_engine() -> Contestant:
    from torchport import Accelerator
    from torchport.utils import DataLoaderConfiguration, DeepSpeedPlugin

    options = DataLoaderConfiguration(split_batches=True)
    return Accelerated(Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2), dataloader_config=options))


ENGINES: dict[str, Callable[[], Contestant]] = {
    "deepspeed": HandWrittenEngine,
    "torchport": torchport_engine,
    "deepspeed (again)": HandWrittenEngine,
}
"""The same loop with DeepSpeed's engine."""


def parameters(contestant: Contestant) -> torch.Tensor:
    """Return all parameters in one vector."""
    held = [parameter.detach() for parameter in contestant.model.parameters()]
    here = [value.to_local() if hasattr(value, "to_local") else value for value in held]
    return torch.cat([value.flatten() for value in here])


def check(contestants: Mapping[str, Contestant]) -> None:
    """Make sure that all have trained the same.

    Raises:
        AssertionError: if parameters differ by more than rounding.
    """
    expected = parameters(next(iter(contestants.values())))
    for name, contestant in contestants.items():
        torch.testing.assert_close(
            parameters(contestant), expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
