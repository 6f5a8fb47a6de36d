"""Uneven numbers of batches.

Where every step takes all processes, and where an accumulation window has several micro-batches, of which all
processes must exchange the gradients of the same one: a process whose batches have come to an end goes on with its
last one, whose loss counts nothing, until all have. The gradients are those of the batches that there were, divided
by the number of all processes, as under `torch.distributed.algorithms.join`.

Elsewhere it is up to the strategy: a process without batches leaves the loop, and answers for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchport.errors import ConfigurationError
from torchport.plugin.context import RunContext
from torchport.plugin.strategy import Strategy
from torchport.state import GradientState

_NONE: Any = object()


@contextmanager
def joining(
    gradients: GradientState,
    context: RunContext,
    strategy: Strategy,
    models: Iterable[torch.nn.Module],
    *,
    even_batches: bool | None,
    owns_accumulation: bool,
) -> Iterator[None]:
    """Let processes have different numbers of batches inside the block.

    Args:
        gradients: The shared gradient state, through which loaders and accumulation windows are told.
        context: The run.
        strategy: The strategy of the run.
        models: The prepared models trained in the block.
        even_batches: As for `Strategy.join`.
        owns_accumulation: Whether the strategy counts micro-batches itself, and would not heed what they weigh.
    """
    several = context.topology.world_size > 1
    windows = several and gradients.num_steps > 1 and not owns_accumulation
    lends = strategy.steps_together or windows
    before = gradients.lend, gradients.may_leave
    if lends:
        gradients.lend = Lender(gradients, context).lend
    gradients.may_leave = several and not lends and not owns_accumulation
    try:
        with strategy.join(models, even_batches=even_batches):
            yield
    finally:
        gradients.lend, gradients.may_leave = before
        gradients.weightless = False


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
                reason="every step takes all processes under this strategy, and so does every accumulation window",
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
