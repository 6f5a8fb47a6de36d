"""Accumulation windows: which micro-batch ends one, and what its gradients are divided by.

A window is the micro-batches between two optimizer steps. Its last one exchanges gradients over processes. The
loss of each is divided by the number of micro-batches *in its own window*, so that a shorter window at the end of
a loader is averaged like any other. Given counts of items (tokens, pixels), every item weighs the same instead:

    gradient = sum over processes, micro-batches and items of the item's gradient / number of all items

which is the gradient of one big batch, however the items are spread over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._unsettled = False
        self._item_scale: float | None = None
        self._models: tuple[torch.nn.Module, ...] = ()
        self._inside = False
        self._loader: Any = None
        self._counts: dict[int, Any] = {}
        self._contexts: list[AbstractContextManager[Any]] = []
        self._backward: Callable[..., None] = torch.Tensor.backward
        self._held: list[Callable[[Sequence[torch.nn.Module]], list[torch.Tensor]]] = []
        self._no_sync: Callable[[torch.nn.Module], AbstractContextManager[Any]] | None = None

    def bind(self, prepared: Prepared) -> None:
        """Take over the callables of a strategy."""
        self._backward = prepared.backward
        self._held.append(prepared.gradients)
        self._no_sync = prepared.no_sync

    def begin(
        self, models: tuple[torch.nn.Module, ...], num_items: Any, reduction: str
    ) -> AccumulationWindow:
        """Count one micro-batch and decide whether it ends the window."""
        gradients = self.gradients
        if self._inside:
            raise ConfigurationError(
                "accumulate() was called inside accumulate()",
                reason="one context is one micro-batch",
                hint="accumulate(model_a, model_b) for several models",
            )
        if self.steps == 1 and num_items is None and self.items is None:  # every micro-batch is a window
            self.done = 1
            gradients.sync_gradients = True
            return self
        if gradients.may_leave:
            raise _some_may_have_left(num_items is not None)
        loader = self._followed() if gradients.plugin.sync_with_dataloader else None
        if self.done == 0:
            self._open(loader)
        self.done += 1
        last = self.done >= self.size or (loader is not None and loader.end_of_dataloader)
        gradients.sync_gradients = last
        self._models = models
        if num_items is not None:
            self._weigh(num_items, reduction)
        elif self.items is not None:
            raise _some_without_items()
        self._unsettled = last and (self.items is not None or self.done < self.size)
        if not last and self._no_sync is not None and not gradients.plugin.sync_each_batch:
            self._contexts = [self._no_sync(model) for model in models]
        return self

    def reset(self) -> None:
        """Begin anew: the next micro-batch is the first of its window."""
        self.done = 0
        self.divisor = self.steps
        self.items = self.weight = None
        self._unsettled = False
        self.gradients.sync_gradients = True

    def _followed(self) -> Any:
        """Return the loader whose end ends the window: the one that gives a batch for every micro-batch.

        A loader that is only held open, as by `iter(validation_loader)`, is not followed. Where several give
        batches, it is the one whose epoch began first; where none has given one, the same as before.
        """
        loaders = self.gradients.dataloader_references[1:]
        counts = {id(loader): getattr(loader, "batches_given", None) for loader in loaders}
        before, self._counts = self._counts, counts
        if len(loaders) > 1 or (before and loaders):
            drawn = [
                one for one in loaders if counts[id(one)] is None or before.get(id(one)) != counts[id(one)]
            ]
            same = [one for one in loaders if one is self._loader]
            loaders = [one for one in drawn if one is self._loader] or drawn or same
        self._loader = loaders[0] if loaders else None
        return self._loader

    def _open(self, loader: Any) -> None:
        """Plan a new window: shorter if the loader has fewer batches left."""
        self.size = self.steps
        if loader is not None and loader.batches_left is not None:
            self.size = max(1, min(self.steps, loader.batches_left + 1))
        self.divisor = self.size
        self.items = self.weight = None

    def _weigh(self, num_items: Any, reduction: str) -> None:
        """Weigh this micro-batch by its number of items instead of equally."""
        num_items = num_items * 0 if self.gradients.weightless else num_items
        if reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"accumulate(reduction={reduction!r}) is not known",
                hint='"mean" if the loss is a mean over num_items, "sum" if it is their sum',
            )
        if self.items is None and self.done > 1:
            raise _some_without_items()
        if self._item_scale is None:
            self._item_scale = self._typical(num_items)
        self.items = num_items if self.items is None else self.items + num_items
        self.weight = (num_items if reduction == "mean" else 1) / self._item_scale
        self.divisor = 1

    def _typical(self, num_items: Any) -> float:
        """Return the mean number of items of the first micro-batches of all processes.

        Losses are divided by it before their backward, so that weights are around 1 and half-precision gradients
        do not overflow; the division is undone when the window is settled.
        """
        return max(1.0, float(self._over_processes(num_items)) / self.context.topology.world_size)

    def _over_processes(self, number: Any) -> Any:
        """Return the sum of a number over all processes."""
        context = self.context
        if context.collectives is None or context.topology.world_size == 1:
            return number
        number = torch.as_tensor(number, device=context.device).detach().clone()
        return context.collectives.all_reduce(number, "sum")

    def __enter__(self) -> AccumulationWindow:
        self._inside = self.gradients.inside_window = True
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = self.gradients.inside_window = False
        if self._contexts:
            contexts, self._contexts = self._contexts, []
            for context in reversed(contexts):
                context.__exit__(kind, error, trace)
        if error is not None:
            self.reset()
        elif self.gradients.sync_gradients:
            self.done = 0
            self.divisor = self.steps
            self.weight = None
        if self.on_exit is not None:
            self.on_exit()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of the loss, divided or weighted as its window asks for.

        Args:
            loss: A tensor of one element.
            **kwargs: Passed on to `torch.Tensor.backward`.
        """
        if self.gradients.weightless:
            loss = loss * 0
        if self.divisor != 1:
            loss = loss / self.divisor
        elif self.weight is not None:
            loss = loss * self.weight
        self._backward(loss, **kwargs)
        if self._unsettled:
            self._settle()

    def _settle(self) -> None:
        """Normalise the gradients of the window that ends now; a further loss of it comes normalised already."""
        self._unsettled = False
        if self.items is None:  # the loader had no length and ended inside the window
            self._scale_gradients(self.size / self.done)
            self.divisor = self.done
            return
        total = self._over_processes(self.items)
        self.items = None
        scale = (self._item_scale or 1.0) * self.context.topology.world_size
        factor: Any
        if isinstance(total, torch.Tensor):
            total = total.to(torch.float32)
            factor = torch.where(total > 0, scale / total, 0.0)
        else:
            factor = scale / total if total > 0 else 0.0
        self._scale_gradients(factor)
        self.weight = self.weight * factor

    def _scale_gradients(self, factor: Any) -> None:
        """Multiply the gradients of the models given to `accumulate`, or of all, each once."""
        found = {id(gradient): gradient for held in self._held for gradient in held(self._models)}
        if found:
            torch._foreach_mul_(list(found.values()), factor)


def _some_may_have_left(items: bool) -> ConfigurationError:
    what = "num_items" if items else "a window of several micro-batches"
    return ConfigurationError(
        f"accumulate() with {what} takes all processes, and inside this join_uneven_inputs() some may have left",
        reason="it began with gradient_accumulation_steps=1: a process without batches leaves the loop",
        hint="even_batches=True without join_uneven_inputs(), or leave num_items out"
        if items
        else "set gradient_accumulation_steps before join_uneven_inputs()",
    )


def _some_without_items() -> ConfigurationError:
    return ConfigurationError(
        "accumulate() was given num_items for some micro-batches of a window and not for others",
        hint="give num_items to every micro-batch, or to none",
    )
