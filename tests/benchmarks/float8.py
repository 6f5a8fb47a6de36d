"""The same loop with products in 8 bits: written by hand with torchao, and with Torchport. Emulated on processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from contestants import BATCH, STEPS, Contestant
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

WIDTH, LAYERS = 64, 2


class Block(nn.Module):
    """Two layers that are computed in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def parts() -> tuple[nn.Sequential, TensorDataset]:
    """Make the model and its data; all sizes are multiples of 16, as FP8 needs them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDTH), *[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 16))
    samples = STEPS * BATCH
    return model, TensorDataset(torch.randn(samples, 32), torch.randint(0, 16, (samples,)))


class HandWritten(Contestant):
    """torchao alone: all linear layers but the first and the last in 8 bits, the rest in bfloat16."""

    def __init__(self) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        model, data = parts()
        ends = ("0", str(len(model) - 1))
        self.model = convert_to_float8_training(
            model,
            module_filter_fn=lambda module, name: name not in ends,
            config=Float8LinearConfig(emulate=True),
        )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.loader = DataLoader(data, batch_size=BATCH)

    def epoch(self) -> Iterator[None]:
        model, optimizer = self.model, self.optimizer
        for inputs, labels in self.loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(inputs)
            loss = cross_entropy(outputs.float(), labels)
            loss.backward()
            optimizer.step()
            yield


class Float8(Contestant):
    """Torchport with the precision `fp8`."""

    def __init__(self) -> None:
        from torchport import Accelerator
        from torchport_fp8 import AORecipeKwargs

        self.accelerator = Accelerator(precision=AORecipeKwargs(emulate=True))
        model, data = parts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = DataLoader(data, batch_size=BATCH)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def epoch(self) -> Iterator[None]:
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        for inputs, labels in self.loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
            yield


CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    "torchao": HandWritten,
    "torchport": Float8,
    "torchao (again)": HandWritten,
}
