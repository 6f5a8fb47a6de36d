"""The same loop over sharded parameters: written by hand with FSDP2, and with Torchport.

accelerate is missing: on CPUs it takes DDP instead of FSDP without saying so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from contestants import BATCH, STEPS, Contestant
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WIDTH, LAYERS = 256, 4


class Block(nn.Module):
    """A unit: parameters that are gathered together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def parts() -> tuple[nn.Module, TensorDataset]:
    """Make the model, and the data of all processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDTH), *[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 10))
    samples = STEPS * BATCH * dist.get_world_size()
    return model, TensorDataset(torch.randn(samples, 32), torch.randint(0, 10, (samples,)))


class HandWritten(Contestant):
    """PyTorch alone."""

    def __init__(self) -> None:
        model, data = parts()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model:
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        self.model = fully_shard(model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))

    def epoch(self) -> Iterator[None]:
        model, optimizer = self.model, self.optimizer
        for inputs, labels in self.loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield


class Sharded(Contestant):
    """Torchport with the strategy `fsdp`."""

    def __init__(self) -> None:
        from torchport import Accelerator
        from torchport.utils import DataLoaderConfiguration
        from torchport_fsdp import FullyShardedDataParallelPlugin

        settings = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=["Block"])
        self.accelerator = Accelerator(
            strategy=settings, dataloader_config=DataLoaderConfiguration(split_batches=True)
        )
        model, data = parts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = DataLoader(data, batch_size=BATCH * dist.get_world_size())
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def epoch(self) -> Iterator[None]:
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        for inputs, labels in self.loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            yield


CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    "torch": HandWritten,
    "torchport": Sharded,
    "torch (again)": HandWritten,
}
