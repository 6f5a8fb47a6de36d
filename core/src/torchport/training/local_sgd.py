"""Local SGD: processes train apart for some steps and then average their parameters.

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.ops import exchange

if TYPE_CHECKING:
    from torchport.accelerator import Accelerator

_BUCKET = 2**25
"""Elements that are averaged in one operation."""


class LocalSGD:
    """A context in which gradients stay local, and parameters are averaged every few steps and at the end.

    Every process must take the same number of steps. The state of optimizers stays local; buffers become those of
    process 0 whenever parameters are averaged. Leaving the context by an exception averages nothing.

    Args:
        accelerator: The accelerator that prepared the model.
        model: The prepared model.
        local_sgd_steps: Optimizer steps between two averages.
        enabled: Whether to do any of this.

    Raises:
        ConfigurationError: if `local_sgd_steps` is not a positive number, or the model is not prepared.
        UnsupportedOperationError: if the run's strategy does not keep a whole replica of the model in each process.
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        self.accelerator = accelerator
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile was given
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0
        self._trained: set[int] = set()
        self._no_sync: AbstractContextManager[None] | None = None
        if not enabled:
            return
        if not isinstance(local_sgd_steps, int) or local_sgd_steps < 1:
            raise ConfigurationError(
                f"LocalSGD(local_sgd_steps={local_sgd_steps!r}) must be a whole number, at least 1",
                hint="enabled=False trains without local steps",
            )
        if self.enabled:
            self._check()

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self.num_steps = 0
            self._trained = {id(p) for p in self.model.parameters() if p.requires_grad}
            self._no_sync = self.accelerator.no_sync(self.model)
            self._no_sync.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._no_sync is not None:
            context, self._no_sync = self._no_sync, None
            context.__exit__(kind, error, trace)
            if error is None:  # other processes may still run, and nobody would answer
                self._average()

    def step(self) -> None:
        """Count an optimizer step, and average if it is time; call it after every `optimizer.step()`.

        Calls inside an accumulation window that is not complete do not count.
        """
        if self.enabled and self.accelerator.sync_gradients:
            self.num_steps += 1
            if self.num_steps % self.local_sgd_steps == 0:
                self._average()

    def _check(self) -> None:
        strategy, plan = self.accelerator._contents.strategy, self.accelerator.plan
        if not strategy.supports_local_steps:
            raise UnsupportedOperationError(
                f"LocalSGD does not work with strategy {plan.strategy!r} ({plan['strategy'].source})",
                reason="it averages replicas, and this strategy does not say that each process has a whole one",
                hint="strategy='ddp'",
            )
        if not any(self.model is prepared for prepared in self.accelerator._contents.models):
            raise ConfigurationError(
                f"LocalSGD was given a {type(self.model).__name__} that this accelerator has not prepared",
                reason="only of a prepared model can gradients be kept local",
                hint="model = accelerator.prepare(model), and LocalSGD(accelerator, model, ...)",
            )
        sharded = [name for name, p in self.model.named_parameters() if hasattr(p, "placements")]
        if sharded:
            raise UnsupportedOperationError(
                "LocalSGD averages whole parameters only",
                found=f"{sharded[0]} is a DTensor, as are {len(sharded) - 1} others",
                hint="train a model that is not sharded",
            )

    @torch.no_grad()
    def _average(self) -> None:
        """Replace trained parameters by their mean over processes, and buffers by those of process 0."""
        trained = [p for p in self.model.parameters() if p.requires_grad or id(p) in self._trained]
        for bucket in _buckets(trained):
            mean = exchange.reduce(_flat(bucket), "mean")
            _fill(bucket, mean)
        for bucket in _buckets(self.model.buffers()):
            _fill(bucket, exchange.broadcast(_flat(bucket)))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors of one dtype and device, so that small ones share an operation."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    elements: dict[tuple[torch.dtype, torch.device], int] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        groups.setdefault(kind, []).append(tensor.detach())
        elements[kind] = elements.get(kind, 0) + tensor.numel()
        if elements[kind] >= _BUCKET:
            yield groups.pop(kind)
            elements[kind] = 0
    yield from groups.values()


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _fill(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
