"""The strategy `megatron`: Megatron-Core's engine in the place of model, optimizer and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from torchport.errors import ConfigurationError, OperationError
from torchport.plugin import Prepared, PrepareRequest, Strategy, StrategySpec, Topology

from torchport_megatron.config import MegatronLMPlugin
from torchport_megatron.engine import MegatronEngine
from torchport_megatron.mapping import shape_of
from torchport_megatron.placeholders import MegatronLMDummyScheduler


class MegatronStrategy(Strategy):
    """Tensor, pipeline, sequence and data parallelism by Megatron-Core."""

    config: MegatronLMPlugin
    shards = "megatron"

    def __init__(self, spec: StrategySpec, config: MegatronLMPlugin | None = None) -> None:
        super().__init__(spec, config or MegatronLMPlugin())
        self.engine: MegatronEngine | None = None

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Make the engine of a model of transformers, with random weights, and bind the step to it.

        Raises:
            ConfigurationError: for more than one model or optimizer, accumulation, or a model of another kind.
        """
        self._check(request)
        for model in request.models:
            self._open_groups()
            shape = shape_of(getattr(model, "config", model))
            dtype = request.context.precision.compute_dtype
            self.engine = MegatronEngine(shape, self.config, dtype, request.context.device)
        for optimizer in request.optimizers:
            schedulers = [one for one in request.objects if isinstance(one, MegatronLMDummyScheduler)]
            self._engine().attach(optimizer, schedulers[0] if schedulers else None)
        return Prepared(
            models=() if not request.models or self.engine is None else (self.engine,),
            optimizers=request.optimizers,
            backward=_nothing,
            step=self._step,
            zero_grad=_nothing,
            no_sync=_no_context,
            clip_grad_norm=self._clipped,
            clip_grad_value=_cannot_clip_values,
            gradients=self._gradients,
            unscale_gradients=_nothing,
            owns_accumulation=True,
        )

    def data_share(self, topology: Topology) -> tuple[int, int]:
        """Return the place among the data-parallel processes: those of one model read the same batches."""
        tensor, pipeline = self.config.tp_degree, self.config.pp_degree
        count = topology.world_size // (tensor * pipeline)
        return topology.rank // tensor % count, count

    def save_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Write Megatron-Core's distributed checkpoint."""
        dist_checkpointing.save(self._sharded_state(bool(optimizers)), str(folder))

    def load_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Read it, by as many tensor- and pipeline-parallel processes or others."""
        engine = self._engine()
        state = dist_checkpointing.load(self._sharded_state(bool(optimizers)), str(folder))
        engine.module.load_state_dict(state["model"])
        if optimizers:
            engine.optimizer.load_state_dict(state["optimizer"])

    def _sharded_state(self, with_optimizer: bool) -> dict[str, Any]:
        engine = self._engine()
        model = engine.module.sharded_state_dict()
        state = {"model": model}
        if with_optimizer:
            state["optimizer"] = engine.optimizer.sharded_state_dict(model)
        return state

    def _open_groups(self) -> None:
        """Divide the processes over tensor, pipeline and data parallelism, once."""
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(self.config.tp_degree, self.config.pp_degree)
            tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)

    def _check(self, request: PrepareRequest) -> None:
        known = 0 if self.engine is None else 1
        if len(request.models) + known > 1 or len(request.optimizers) > 1:
            raise ConfigurationError(
                "the strategy 'megatron' prepares one model and one optimizer",
                found=f"{len(request.models) + known} models, {len(request.optimizers)} optimizers",
            )
        if request.context.accumulation_steps > 1:
            raise ConfigurationError(
                f"gradient_accumulation_steps={request.context.accumulation_steps} with the strategy 'megatron'",
                reason="its micro-batches are what is accumulated",
                hint="MegatronLMPlugin(num_micro_batches=...)",
            )

    def _engine(self) -> MegatronEngine:
        if self.engine is None:
            raise ConfigurationError(
                "the strategy 'megatron' has no model yet", hint="prepare model and optimizer in one call"
            )
        return self.engine

    def _step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> bool:
        return self._engine().step()

    def _clipped(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        if max_norm != self.config.gradient_clipping or norm_type != 2:
            raise OperationError(
                f"clip_grad_norm_(max_norm={max_norm}, norm_type={norm_type}) with the strategy 'megatron'",
                found=f"gradient_clipping is {self.config.gradient_clipping}",
                reason="Megatron-Core clips when it steps",
                hint=f"MegatronLMPlugin(gradient_clipping={max_norm})",
            )
        return self._engine().grad_norm  # of the step before

    def _gradients(self, models: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
        return [p.main_grad for p in self._engine().module.parameters() if hasattr(p, "main_grad")]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What the engine has done in its forward, or does when it steps."""


def _no_context(model: torch.nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


def _cannot_clip_values(parameters: Iterable[torch.Tensor], value: float) -> None:
    raise OperationError(
        "clip_grad_value_ with the strategy 'megatron'",
        reason="Megatron-Core clips by the norm of all gradients",
        hint="MegatronLMPlugin(gradient_clipping=...)",
    )
