"""Uneven numbers of batches where every step takes all processes.

A process whose batches have come to an end goes on with its last one, whose loss counts nothing, until all have.
The gradients are those of the batches that there were, divided by the number of all processes, as under
`torch.distributed.algorithms.join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchport.errors import ConfigurationError
from torchport.plugin.context import RunContext
from torchport.state import GradientState

_NONE: Any = object()


@contextmanager
def lending(gradients: GradientState, context: RunContext) -> Iterator[None]:
    """Let loaders go on on every process until they have come to an end on all.

    Args:
        gradients: The shared gradient state, through which loaders and accumulation windows are told.
        context: The run.
    """
    lender = Lender(gradients, context)
    before, gradients.lend = gradients.lend, lender.lend
    try:
        yield
    finally:
        gradients.lend, gradients.weightless = before, False


class Lender:
    """Gives out the batches of a loader, and batches that weigh nothing where there are no more."""

    def __init__(self, gradients: GradientState, context: RunContext) -> None:
        self.gradients = gradients
        self.context = context

    def lend(self, loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """Give out batches until no process has any left.

        Raises:
            ConfigurationError: on every process, if one has no batch at all.
        """
        gradients = self.gradients
        current = next(batches, _NONE)
        if self._processes_with(current) < self.context.topology.world_size:
            raise ConfigurationError(
                "some processes have no batch at all, and nothing to go on with",
                reason="every step takes all processes under this strategy",
                hint="fewer processes, smaller batches, or even_batches=True",
            )
        mine = True
        gradients._add_dataloader(loader)
        try:
            while True:
                following = next(batches, _NONE) if mine else _NONE
                last = self._processes_with(following) == 0
                loader.end_of_dataloader, loader.batches_left = last, 0 if last else None
                gradients.weightless = not mine
                yield current
                if last:
                    return
                mine = following is not _NONE
                current = following if mine else current
        finally:
            gradients.weightless = False
            gradients._remove_dataloader(loader)

    def _processes_with(self, batch: Any) -> int:
        """Return how many processes have a batch."""
        flag = torch.tensor(int(batch is not _NONE), device=self.context.device)
        if self.context.collectives is None:
            return int(flag)
        return int(self.context.collectives.all_reduce(flag, "sum"))
