"""Strategies with a replica in each process, each wrong in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torchport.plugin import Prepared, PrepareRequest, Strategy, bind_step


class SteadyStrategy(Strategy):
    """Right: gradients are averaged after each backward that ends a window."""

    keep_local = False

    def prepare(self, request: PrepareRequest) -> Prepared:
        context = request.context
        models = [context.precision.apply(model.to(context.device), context) for model in request.models]
        bound = bind_step(request, models, no_sync=self._no_sync)
        parameters = [p for model in models for p in model.parameters()]

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            bound.backward(loss, **kwargs)
            if not self.keep_local:
                self.synchronize(parameters, context.collectives)

        return self.finish(dataclasses.replace(bound, backward=backward))

    def finish(self, bound: Prepared) -> Prepared:
        return bound

    def synchronize(self, parameters: Iterable[torch.nn.Parameter], collectives: Any) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                collectives.all_reduce(parameter.grad)
                parameter.grad.div_(collectives.world_size)

    def _no_sync(self, model: torch.nn.Module) -> Any:
        return _Local(self)


class _Local:
    def __init__(self, strategy: SteadyStrategy) -> None:
        self.strategy = strategy

    def __enter__(self) -> None:
        self.strategy.keep_local = True

    def __exit__(self, *_: object) -> None:
        self.strategy.keep_local = False


class DoesNotSync(SteadyStrategy):
    def synchronize(self, parameters, collectives) -> None:
        pass


class SumsGradients(SteadyStrategy):
    def synchronize(self, parameters, collectives) -> None:
        for parameter in parameters:
            collectives.all_reduce(parameter.grad)


class OtherNames(SteadyStrategy):
    def model_state_dict(self, model) -> dict[str, Any]:
        return {f"module.{name}": value for name, value in super().model_state_dict(model).items()}


class DividesTwice(SteadyStrategy):
    def finish(self, bound: Prepared) -> Prepared:
        return dataclasses.replace(bound, owns_accumulation=True)


class ClipsByPart(SteadyStrategy):
    def finish(self, bound: Prepared) -> Prepared:
        def clip(parameters, max_norm, norm_type):
            norms = [torch.nn.utils.clip_grad_norm_([p], max_norm, norm_type) for p in parameters]
            return torch.stack(norms).norm(norm_type)

        return dataclasses.replace(bound, clip_grad_norm=clip)


class LosesMomentum(SteadyStrategy):
    def optimizer_state_dict(self, model, optimizer) -> dict[str, Any]:
        return {**super().optimizer_state_dict(model, optimizer), "state": {}}


class LoadsNothing(SteadyStrategy):
    def load_optimizer_state_dict(self, model, optimizer, state) -> None:
        pass
