"""Accumulation windows: which micro-batch ends one, and what its gradients are divided by.

A window is the micro-batches between two optimizer steps. Its last one exchanges gradients over processes. The
loss of each is divided by the number of micro-batches *in its own window*, so that a shorter window at the end of
a loader is averaged like any other. Given counts of items (tokens, pixels), every item weighs the same instead:

    gradient = sum over processes, micro-batches and items of the item's gradient / number of all items

which is the gradient of one big batch, however the items are spread over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from torchport.errors import ConfigurationError
from torchport.plugin.context import RunContext
from torchport.plugin.strategy import Prepared

if TYPE_CHECKING:
    from torchport.state import GradientState


class AccumulationWindow:
    """The context that `Accelerator.accumulate` returns; one object, entered once for each micro-batch.

    Args:
        gradients: The shared gradient state, whose `sync_gradients` this sets.
        context: The run.
        on_exit: Called at the end of each micro-batch, where the backend wants to be told.
    """

    def __init__(
        self, gradients: GradientState, context: RunContext, on_exit: Callable[[], None] | None = None
    ) -> None:
        self.gradients = gradients
        self.context = context
        self.on_exit = on_exit
        self.steps = gradients.num_steps
        self.done = 0
        self.size = self.steps
        self.divisor = self.steps
        self.items: Any = None
        self.weight: Any = None
        self._contexts: list[AbstractContextManager[Any]] = []
        self._backward: Callable[..., None] = torch.Tensor.backward
        self._gradients: list[Callable[[], list[torch.Tensor]]] = []
        self._no_sync: Callable[[torch.nn.Module], AbstractContextManager[Any]] | None = None

    def bind(self, prepared: Prepared) -> None:
        """Take over the callables of a strategy."""
        self._backward = prepared.backward
        self._gradients.append(prepared.gradients)
        self._no_sync = prepared.no_sync

    def begin(
        self, models: tuple[torch.nn.Module, ...], num_items: Any, reduction: str
    ) -> AccumulationWindow:
        """Count one micro-batch and decide whether it ends the window."""
        gradients = self.gradients
        if self.steps == 1 and num_items is None and self.items is None:  # every micro-batch is a window
            self.done = 1
            gradients.sync_gradients = True
            return self
        loader = gradients.active_dataloader if gradients.plugin.sync_with_dataloader else None
        if self.done == 0:
            self._open(loader)
        self.done += 1
        last = self.done >= self.size or (loader is not None and loader.end_of_dataloader)
        gradients.sync_gradients = last
        if num_items is not None:
            self._weigh(num_items, reduction)
        elif self.items is not None:
            raise ConfigurationError(
                "accumulate() was given num_items for some micro-batches of a window and not for others",
                hint="give num_items to every micro-batch, or to none",
            )
        if not last and self._no_sync is not None and not gradients.plugin.sync_each_batch:
            self._contexts = [self._no_sync(model) for model in models]
        return self

    def _open(self, loader: Any) -> None:
        """Plan a new window: shorter if the loader has fewer batches left."""
        self.size = self.steps
        if loader is not None and loader.batches_left is not None:
            self.size = min(self.steps, loader.batches_left + 1)
        self.divisor = self.size
        self.items = self.weight = None

    def _weigh(self, num_items: Any, reduction: str) -> None:
        """Weigh this micro-batch by its number of items instead of equally."""
        if reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"accumulate(reduction={reduction!r}) is not known",
                hint='"mean" if the loss is a mean over num_items, "sum" if it is their sum',
            )
        if self.items is None and self.done > 1:
            raise ConfigurationError(
                "accumulate() was given num_items for some micro-batches of a window and not for others",
                hint="give num_items to every micro-batch, or to none",
            )
        self.items = num_items if self.items is None else self.items + num_items
        self.weight = num_items if reduction == "mean" else 1
        self.divisor = 1

    def __enter__(self) -> AccumulationWindow:
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._contexts:
            contexts, self._contexts = self._contexts, []
            for context in reversed(contexts):
                context.__exit__(kind, error, trace)
        if self.gradients.sync_gradients or error is not None:
            self.done = 0
        if self.on_exit is not None:
            self.on_exit()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of the loss, divided or weighted as its window asks for.

        Args:
            loss: A tensor of one element.
            **kwargs: Passed on to `torch.Tensor.backward`.
        """
        if self.divisor != 1:
            loss = loss / self.divisor
        elif self.weight is not None:
            loss = loss * self.weight
        self._backward(loss, **kwargs)
        if self.items is not None:
            if self.gradients.sync_gradients:
                self._normalize_by_items()
        elif self.done < self.size and self.done and self.gradients.sync_gradients:
            self._scale_gradients(
                self.size / self.done
            )  # the loader had no length and ended inside the window
            self.size = self.divisor = self.done

    def _scale_gradients(self, factor: Any) -> None:
        """Multiply all gradients, each once, however many calls of `prepare` know of it."""
        found = {id(gradient): gradient for held in self._gradients for gradient in held()}
        if found:
            torch._foreach_mul_(list(found.values()), factor)

    def _normalize_by_items(self) -> None:
        """Turn gradients averaged over processes into the sum over all items divided by their number."""
        context, items = self.context, self.items
        self.items = self.weight = None
        if context.collectives is not None and context.topology.world_size > 1:
            items = torch.as_tensor(items, device=context.device).detach().clone()
            items = context.collectives.all_reduce(items, "sum")
        total = items.to(torch.float32) if isinstance(items, torch.Tensor) else items
        if not isinstance(total, torch.Tensor) and total <= 0:
            raise ConfigurationError(
                "the accumulation window has no items", found=f"num_items sums up to {total}"
            )
        self._scale_gradients(context.topology.world_size / total)
