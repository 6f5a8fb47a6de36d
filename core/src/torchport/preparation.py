"""Turn the user's objects into prepared ones, and bind the callables of a step."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchport.checkpoint.state import Contents
from torchport.config.dynamo import TorchDynamoPlugin
from torchport.config.kwargs import DataLoaderConfiguration
from torchport.data.prepare import prepare_data_loader
from torchport.errors import ConfigurationError
from torchport.plugin.backend import Backend
from torchport.plugin.context import RunContext
from torchport.plugin.precision import Precision
from torchport.plugin.strategy import Prepared, PrepareRequest
from torchport.state import GradientState
from torchport.training.accumulation import AccumulationWindow
from torchport.training.compile import compile_model
from torchport.training.lomo import backward_or_fused, fused_backward, fuses_backward
from torchport.training.optimizer import AcceleratedOptimizer
from torchport.training.scheduler import AcceleratedScheduler

_bound: weakref.WeakKeyDictionary[torch.nn.Module, Precision] = weakref.WeakKeyDictionary()
"""The precision of the run that has prepared a model last, which has left its mark on it."""


class Preparation:
    """Prepares objects with the strategy of the run, and remembers them.

    Attributes:
        contents: What has been prepared, in order; a checkpoint holds its state.
        bound: The callables of a step, as the strategy bound them last.
        window: The accumulation window around them.

    Args:
        contents: Where prepared objects are remembered.
        context: The run.
        gradients: The shared gradient state.
        loaders: How loaders are shared out.
        rng_types: Generators to synchronize at the beginning of each epoch.
        device_placement: Whether models and batches are moved to the device unless said otherwise.
        step_scheduler_with_optimizer: Whether schedulers step when their optimizers do.
        dynamo: How models are compiled; `None` leaves them as they are.
    """

    bound: Prepared
    window: AccumulationWindow

    def __init__(
        self,
        contents: Contents,
        context: RunContext,
        gradients: GradientState,
        loaders: DataLoaderConfiguration,
        rng_types: tuple[str, ...],
        *,
        device_placement: bool,
        step_scheduler_with_optimizer: bool,
        dynamo: TorchDynamoPlugin | None = None,
    ) -> None:
        self.contents = contents
        self.context = context
        self.gradients = gradients
        self.loaders = loaders
        self.rng_types = rng_types
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.dynamo = dynamo
        self.clear()

    def clear(self) -> None:
        """Forget everything prepared, and bind the step of a strategy that has no models.

        Models get their own `forward` back, and the loss scaler forgets the step that it is amid.
        """
        contents, backend, precision = self.contents, self.context.backend, self.context.precision
        for model in contents.models:
            inner = self._inner(model)
            if _bound.get(inner) is precision:  # no other run has prepared it since
                precision.restore(inner)
                del _bound[inner]
        if precision.scaling is not None:
            precision.scaling.abandon()
        for held in (contents.models, contents.optimizers, contents.schedulers, contents.loaders):
            held.clear()
        self._prepared: list[tuple[Any, bool, Any]] = []
        self._parameters: set[int] = set()
        self.gradients.sync_gradients = True
        precision.scaling = None
        marks_steps = type(backend).step_boundary is not Backend.step_boundary
        self.window = AccumulationWindow(
            self.gradients, self.context, backend.step_boundary if marks_steps else None
        )
        self.step([], [], [])

    def discard_gradients(self) -> None:
        """Begin a new accumulation window, without what was computed in the one before: a state has been loaded."""
        self.window.reset()
        for optimizer in self.contents.optimizers:
            optimizer.discard_gradients()
        self.contents.strategy.discard_gradients(self.contents.models)

    @property
    def backward(self) -> Callable[..., None]:
        """The callable that `Accelerator.backward` is."""
        if self.context.topology.world_size > 1 and not self.contents.models:
            return self._refuse_backward
        backward = self.bound.backward if self.bound.owns_accumulation else self.window.backward
        if any(fuses_backward(optimizer.optimizer) for optimizer in self.contents.optimizers):
            return functools.partial(backward_or_fused, backward, self.lomo_backward)
        return backward

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float | None) -> None:
        """Let the optimizers that step inside the backward run it."""
        fused_backward(self.contents.optimizers, loss, learning_rate, self.context)

    def all(self, objects: Sequence[Any], device_placement: Sequence[bool | None] | None) -> list[Any]:
        """Prepare models and optimizers together, then loaders and schedulers; give the rest back."""
        placement = [None] * len(objects) if device_placement is None else list(device_placement)
        if len(placement) != len(objects):
            raise ConfigurationError(
                f"device_placement has {len(placement)} values for {len(objects)} objects",
                hint="one for each",
            )
        for thing in objects:
            _refuse_container(thing)
        result = [self._known(thing) for thing in objects]
        models = [i for i, thing in enumerate(result) if self._is_new_model(thing)]
        optimizers = [i for i, thing in enumerate(result) if _is_new_optimizer(thing)]
        if models or optimizers:
            wrapped_models, wrapped_optimizers = self.step(
                [objects[i] for i in models],
                [objects[i] for i in optimizers],
                [self._place(placement[i]) for i in models],
                objects=objects,
            )
            for i, model in zip(models, wrapped_models, strict=True):
                result[i] = model
            for i, optimizer in zip(optimizers, wrapped_optimizers, strict=True):
                result[i] = optimizer
        for i, thing in enumerate(result):
            if isinstance(thing, DataLoader):
                result[i] = self.loader(thing, placement[i])
            elif (models or optimizers) and id(thing) in self.bound.schedulers:
                result[i] = self.bound.schedulers[id(thing)]
                self.contents.schedulers.append(result[i])
            elif _is_scheduler(thing):
                result[i] = self.scheduler(thing)
        return result

    def step(
        self,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        places: Sequence[bool],
        *,
        evaluation_only: bool = False,
        objects: Sequence[Any] = (),
    ) -> tuple[Sequence[torch.nn.Module], Sequence[AcceleratedOptimizer]]:
        """Let the strategy prepare models and optimizers, and take over its callables."""
        precision = self.context.precision
        for inner in map(self._inner, models):
            earlier = _bound.get(inner, precision)
            if earlier is not precision:
                earlier.restore(inner)
        updated = [_updated(one) for one in optimizers]  # before the strategy puts others in their place
        self._parameters.update(id(parameter) for model in models for parameter in model.parameters())
        request = PrepareRequest(
            models=tuple(compile_model(model, self.dynamo) for model in models),
            optimizers=tuple(precision.convert_optimizer(optimizer) for optimizer in optimizers),
            context=self.context,
            device_placement=tuple(places),
            evaluation_only=evaluation_only,
            objects=tuple(objects),
            split_batches=self.loaders.split_batches,
        )
        self.context.backend.adapt(request)
        prepared = self.contents.strategy.prepare(request)
        _bound.update((self._inner(model), precision) for model in prepared.models)
        wrapped = [
            AcceleratedOptimizer(
                one, prepared, self.gradients, functools.partial(self._check_optimizer, type(raw), facts)
            )
            for one, raw, facts in zip(prepared.optimizers, optimizers, updated, strict=True)
        ]
        raw = (*models, *optimizers)
        self._prepared += [
            (one, evaluation_only, made) for one, made in zip(raw, (*prepared.models, *wrapped), strict=True)
        ]
        self.contents.models.extend(prepared.models)
        self.contents.optimizers.extend(wrapped)
        self.bound = prepared
        self.window.bind(prepared)
        return prepared.models, wrapped

    def _refuse_backward(self, *_: Any, **__: Any) -> None:
        processes = self.context.topology.world_size
        raise ConfigurationError(
            f"backward() where no model is prepared: {processes} processes would train {processes} models",
            hint="model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
        )

    def _check_optimizer(self, kind: type, updated: Mapping[int, torch.Size]) -> None:
        """Refuse the first step of an optimizer whose parameters would be others on each process."""
        processes = self.context.topology.world_size
        if processes == 1:
            return
        known = self._parameters | {id(one) for model in self.contents.models for one in model.parameters()}
        strange = [shape for number, shape in updated.items() if number not in known]
        if strange:
            raise ConfigurationError(
                f"the {kind.__name__} would make {processes} models of one, another on each process",
                found=f"{len(strange)} of its {len(updated)} parameters, the first of shape {tuple(strange[0])}, are"
                " of no model that was prepared",
                hint="model, optimizer = accelerator.prepare(model, optimizer), for every module that it updates",
            )

    def model(self, model: torch.nn.Module, place: bool | None, evaluation_only: bool) -> torch.nn.Module:
        """Prepare a model alone."""
        model = self._known(model, evaluation_only)
        if not self._is_new_model(model):
            return model
        return self.step([model], [], [self._place(place)], evaluation_only=evaluation_only)[0][0]

    def optimizer(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Prepare an optimizer alone."""
        optimizer = self._known(optimizer)
        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        return self.step([], [optimizer], [])[1][0]

    def scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare a scheduler, which follows its own optimizer if that is prepared, or else all of them."""
        scheduler = self._known(scheduler)
        if isinstance(scheduler, AcceleratedScheduler):
            return scheduler
        if self.step_scheduler_with_optimizer and not self.contents.optimizers:
            raise ConfigurationError(
                "a scheduler steps when its optimizer does, and no optimizer is prepared",
                hint="prepare the optimizer before it or in the same call, or step_scheduler_with_optimizer=False",
            )
        optimizers = self.contents.optimizers
        _, processes = self.contents.strategy.data_share(self.context.topology)
        steps = 1 if self.loaders.split_batches else processes
        wrapped = AcceleratedScheduler(
            scheduler,
            [one for one in optimizers if scheduler.optimizer in (one, one.optimizer)] or optimizers,
            self.gradients,
            step_with_optimizer=self.step_scheduler_with_optimizer,
            steps_per_update=steps,
        )
        announce = steps > 1 and self.step_scheduler_with_optimizer and not self.contents.schedulers
        if announce and self.context.topology.rank == 0:
            print(  # noqa: T201
                f"torchport: schedulers step {steps} times for each optimizer step, as one process would have over"
                " the same data. For a scheduler that steps once an epoch, or that counts the steps of all processes:"
                " Accelerator(step_scheduler_with_optimizer=False); to keep batch size and steps as they are:"
                " DataLoaderConfiguration(split_batches=True)",
                file=sys.stderr,
            )
        self._prepared.append((scheduler, False, wrapped))
        self.contents.schedulers.append(wrapped)
        return wrapped

    def loader(
        self,
        loader: DataLoader[Any],
        place: bool | None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Prepare a loader."""
        if any(loader is known for known in self.contents.loaders):
            return loader
        index, count = self.contents.strategy.data_share(self.context.topology)
        share = prepare_data_loader(
            loader,
            num_processes=count,
            process_index=index,
            readers=self.context.topology.world_size // count,
            put_on_device=self._place(place),
            rng_types=self.rng_types,
            split_batches=self.loaders.split_batches,
            dispatch_batches=self.loaders.dispatch_batches,
            even_batches=self.loaders.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=self.loaders.use_seedable_sampler,
            data_seed=self.loaders.data_seed,
            non_blocking=self.loaders.non_blocking,
            use_stateful_dataloader=self.loaders.use_stateful_dataloader,
            prefetch_to_device=self.loaders.prefetch_to_device,
        )
        prepared = self.context.backend.wrap_dataloader(share, self.context.device)
        self.contents.loaders.append(prepared)
        return prepared

    def _inner(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.contents.strategy.unwrap(getattr(model, "_orig_mod", model))

    def _place(self, asked: bool | None) -> bool:
        return self.device_placement if asked is None else asked

    def _known(self, thing: Any, evaluation_only: bool = False) -> Any:
        """Return what was made of an object that is prepared already, or else the object itself."""
        for raw, only_evaluated, made in self._prepared:
            if raw is thing and only_evaluated == evaluation_only:
                return made
        return thing

    def _is_new_model(self, thing: Any) -> bool:
        return isinstance(thing, torch.nn.Module) and all(
            thing is not known for known in self.contents.models
        )


def _updated(optimizer: torch.optim.Optimizer) -> dict[int, torch.Size]:
    """Return identities and shapes of what an optimizer updates; the tensors themselves may be freed."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    return {id(one): one.shape for one in parameters if one.requires_grad}


def _refuse_container(thing: Any) -> None:
    """Refuse a list or tuple of what would be prepared by itself."""
    if isinstance(thing, (list, tuple)):
        for held in thing:
            if isinstance(held, (torch.nn.Module, torch.optim.Optimizer, DataLoader)):
                raise ConfigurationError(
                    f"prepare() takes objects one by one, and was given a {type(thing).__name__} with a"
                    f" {type(held).__name__}",
                    hint="accelerator.prepare(*objects)",
                )


def _is_new_optimizer(thing: Any) -> bool:
    return isinstance(thing, torch.optim.Optimizer) and not isinstance(thing, AcceleratedOptimizer)


def _is_scheduler(thing: Any) -> bool:
    """Whether `thing` is a scheduler: PyTorch's, or anything that steps beside an optimizer and has a state."""
    if isinstance(thing, (torch.nn.Module, torch.optim.Optimizer, AcceleratedScheduler)):
        return False
    return isinstance(thing, torch.optim.lr_scheduler.LRScheduler) or all(
        hasattr(thing, name) for name in ("step", "optimizer", "state_dict")
    )
