"""The strategy `deepspeed`: one engine for each model that is trained, or that ZeRO-3 partitions for inference."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.ops.pytree import convert_to_fp32, recursively_apply
from torchport.plugin import StrategySpec
from torchport.plugin.binding import bind_step
from torchport.plugin.strategy import Prepared, PrepareRequest, Strategy
from torchport.runtime import Runtime
from torchport.state import GradientState

from torchport_deepspeed import checkpoint, vendor
from torchport_deepspeed.config import DeepSpeedPlugin
from torchport_deepspeed.dummies import DummyOptim, DummyScheduler
from torchport_deepspeed.engine import DeepSpeedEngineWrapper
from torchport_deepspeed.helpers import gathered_parameters
from torchport_deepspeed.resolve import resolve
from torchport_deepspeed.together import come, guard
from torchport_deepspeed.wrappers import DeepSpeedSchedulerWrapper


class DeepSpeedStrategy(Strategy):
    """Hands models to `deepspeed.initialize`, and binds the engine's own `backward` and `step`.

    Args:
        spec: The descriptor.
        config: A `DeepSpeedPlugin`, or several by name, of which one is selected.

    Raises:
        ConfigurationError: if there are several plugins and they are not in a dict.
    """

    shards = checkpoint.FORMAT

    def __init__(self, spec: StrategySpec, config: Any = None) -> None:
        super().__init__(spec, config)
        self.plugins: dict[str, DeepSpeedPlugin] = (
            dict(config) if isinstance(config, Mapping) else {"": config or DeepSpeedPlugin()}
        )
        if not any(plugin.selected for plugin in list(self.plugins.values())[1:]):
            for position, plugin in enumerate(self.plugins.values()):
                plugin.selected = position == 0
        self.engines: list[Any] = []
        self.trained: DeepSpeedEngineWrapper | None = None
        self._set_accumulation()
        runtime = Runtime.current
        if runtime is not None:
            vendor.load(runtime.device, runtime.topology)
            self.plugin.announce()

    @property
    def plugin(self) -> DeepSpeedPlugin:
        """The plugin that is selected."""
        return next(plugin for plugin in self.plugins.values() if plugin.selected)

    def _set_accumulation(self) -> None:
        """Let the accelerator accumulate as the configuration says, where it says so."""
        steps, state = self.plugin.get_value("gradient_accumulation_steps"), GradientState()
        if not self.plugin.steps_given or state.num_steps == steps:
            return
        if state.num_steps != 1:
            _say(
                f"DeepSpeed's configuration accumulates {steps} micro-batches, and the accelerator"
                f' {state.num_steps}: {steps} it is; "auto" takes the accelerator\'s'
            )
        state.plugin.num_steps = steps

    # --- preparing -----------------------------------------------------------------------------------------

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Make an engine for the model, with the optimizer and the scheduler prepared in the same call."""
        if not request.models and not request.optimizers:
            return bind_step(request, ())
        plugin, optimizer = self.plugin, self._check(request)
        if not request.models:
            return bind_step(request, ())
        if optimizer is None and plugin.zero_stage != 3:
            return self._untrained(request)
        (model,) = request.models
        clipping = None if plugin.is_auto("gradient_clipping") else plugin.get_value("gradient_clipping")
        engine = self._engine(plugin, model, optimizer, request)
        self.engines.append(engine)
        if optimizer is None:
            return self._keep_bound(request, (engine,))
        self.trained = DeepSpeedEngineWrapper(engine, clipping)
        prepared = self.trained.prepared((engine,))
        schedulers = {
            id(thing): DeepSpeedSchedulerWrapper(engine.lr_scheduler, prepared.optimizers[0])
            for thing in request.objects
            if isinstance(thing, DummyScheduler)
        }
        return dataclasses.replace(prepared, schedulers=schedulers)

    def _check(self, request: PrepareRequest) -> torch.optim.Optimizer | None:
        """Return the optimizer to train with, if any.

        Raises:
            ConfigurationError: if models and optimizers are not one of each.
        """
        optimizers, models = request.optimizers, request.models
        if not optimizers:
            if len(models) > 1 and self.plugin.zero_stage == 3:
                raise ConfigurationError(
                    f"{len(models)} models in one call of prepare(), with ZeRO stage 3",
                    hint="one model in each call",
                )
            return None
        if len(models) != 1 or len(optimizers) != 1:
            raise ConfigurationError(
                f"{len(models)} models and {len(optimizers)} optimizers in one call of prepare()",
                reason="a DeepSpeed engine is made of one model and its optimizer",
                hint="prepare(model, optimizer, ...), once for each model",
            )
        if self.trained is not None:
            raise ConfigurationError(
                "a second model to be trained by one Accelerator",
                reason="its backward() and step are those of one DeepSpeed engine",
                hint="a second Accelerator(), and prepare the model with that",
            )
        return optimizers[0]

    def _untrained(self, request: PrepareRequest) -> Prepared:
        """Prepare models that need no engine: nothing of them is partitioned."""
        context = request.context
        models = []
        for model, place in zip(request.models, request.device_placement, strict=True):
            placed = model.to(context.device) if place else model
            models.append(context.precision.apply(placed, context))
        return self._keep_bound(request, models)

    def _keep_bound(self, request: PrepareRequest, models: Sequence[torch.nn.Module]) -> Prepared:
        """Return models that are not trained, with the step of the one that is."""
        if self.trained is None:
            return bind_step(request, models)
        return dataclasses.replace(self.trained.prepared(models), optimizers=())

    def _engine(
        self,
        plugin: DeepSpeedPlugin,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        request: PrepareRequest,
    ) -> Any:
        import deepspeed

        context = request.context
        schedulers = [thing for thing in request.objects if _is_scheduler(thing)]
        precision = context.precision.spec.name
        made = resolve(
            plugin,
            model,
            optimizer,
            schedulers,
            _batch_sizes(request),
            precision=precision,
            world_size=context.topology.world_size,
            accumulation=GradientState().num_steps,
            scheduler_divisor=1 if request.split_batches else context.topology.world_size,
        )
        config = made.config
        if optimizer is not None:
            plugin.deepspeed_config = config
        self._gather_whole(plugin, model)
        if precision not in ("no", "bf16", "fp16"):
            model = context.precision.apply(model, context)
        own = optimizer is not None and not isinstance(optimizer, DummyOptim)
        arguments: dict[str, Any] = {"model": model, "config": config}
        if own:
            arguments["optimizer"] = optimizer
        elif optimizer is not None:
            arguments["model_parameters"] = optimizer.param_groups
        made_by = next((s.lr_scheduler_callable for s in schedulers if isinstance(s, DummyScheduler)), None)
        if made_by is not None:
            arguments["lr_scheduler"] = made_by
        with vendor.quietly():
            engine = deepspeed.initialize(**arguments)[0]
        _cast(engine)
        guard(engine, context.topology)
        if context.topology.rank == 0:
            self._report(plugin, engine, made.report(), precision)
        return engine

    def _gather_whole(self, plugin: DeepSpeedPlugin, model: torch.nn.Module) -> None:
        """Mark the classes whose parameters ZeRO-3 gathers as a whole, since not every forward uses all of them."""
        names = [name.strip() for name in (plugin.transformer_moe_cls_names or "").split(",") if name.strip()]
        if not names or plugin.zero_stage != 3:
            return
        from deepspeed.utils import set_z3_leaf_modules

        found = {type(module).__name__: type(module) for module in model.modules()}
        unknown = [name for name in names if name not in found]
        if unknown:
            raise ConfigurationError(
                f"transformer_moe_cls_names: the model has no layer of class {', '.join(unknown)}",
                found=", ".join(sorted(found)),
            )
        set_z3_leaf_modules(model, [found[name] for name in names])

    def _report(self, plugin: DeepSpeedPlugin, engine: Any, resolved: str, precision: str) -> None:
        import deepspeed

        name = next((name for name, one in self.plugins.items() if one is plugin and name), "")
        _say(
            f"DeepSpeed {deepspeed.__version__}{f' ({name})' if name else ''}: ZeRO stage"
            f" {engine.zero_optimization_stage()}, precision {precision}, {engine.gradient_accumulation_steps()}"
            f" micro-batch{'es' * (engine.gradient_accumulation_steps() != 1)} of"
            f" {engine.train_micro_batch_size_per_gpu()} for each step"
        )
        if plugin.has_file and resolved:
            _say(f'what "auto" stands for in its configuration\n{resolved}')

    # --- contexts ------------------------------------------------------------------------------------------

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the module inside the engine."""
        if self._is_engine(model):
            inner: torch.nn.Module = model.module  # type: ignore[assignment]
            return inner
        return model

    def full_parameters(
        self, model: torch.nn.Module, *, writeback: bool = False
    ) -> AbstractContextManager[Any]:
        """Return a context in which a model that ZeRO-3 partitions holds its whole parameters."""
        return gathered_parameters(self.unwrap(model).parameters(), writeback=writeback)

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which each process keeps its part of what is constructed (`deepspeed.zero.Init`)."""
        if self.plugin.zero_stage != 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=self.plugin.config)
        return context

    def trigger_sync_in_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a context after whose backwards a step is due."""
        return self.trained.sync() if self.trained is not None else nullcontext()

    def join(
        self, models: Iterable[torch.nn.Module], *, even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        """Refuse, with several processes: each backward of an engine takes all of them.

        Raises:
            UnsupportedOperationError: with several processes.
        """
        if Runtime.current is not None and Runtime.current.topology.world_size > 1:
            raise UnsupportedOperationError(
                "join_uneven_inputs() with the strategy 'deepspeed'",
                reason="each backward of a DeepSpeed engine takes all processes",
                hint="even batches (the default), or the strategy 'ddp'",
            )
        return nullcontext()

    # --- states --------------------------------------------------------------------------------------------

    def model_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the whole weights on the main process, in the engine's precision; call it on every process.

        Raises:
            CheckpointError: if other processes do not come.
        """
        if not self._is_engine(model):
            return model.state_dict()
        return checkpoint.whole_weights(model)

    def load_model_state_dict(self, model: torch.nn.Module, state: dict[str, Any]) -> Any:
        """Load whole weights, also into the engine's float32 copies; call it on every process."""
        if not self._is_engine(model):
            return model.load_state_dict(state)
        return checkpoint.load_whole_weights(model, state)

    def optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Return the whole state, by name of parameter where ZeRO partitions it; call it on every process."""
        return checkpoint.whole_optimizer(model) if self._is_engine(model) else optimizer.state_dict()

    def load_optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Load the state of an ordinary optimizer; call it on every process."""
        checkpoint.load_whole_optimizer(model, optimizer, state)

    def discard_gradients(self, models: Sequence[torch.nn.Module]) -> None:
        """Let the engine forget the gradients of its window."""
        if self.trained is not None:
            self.trained.discard_gradients()

    def begin_save(self) -> None:
        """Wait until every process is about to save: each engine holds a part of the states.

        Raises:
            CheckpointError: if other processes do not come.
        """
        if self.engines and Runtime.current is not None:
            come("save_state()", Runtime.current.topology)

    def save_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Let each engine save its own files."""
        checkpoint.save(models, folder, self._is_engine)

    def load_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Let each engine load its own files, converted if another number of processes saved them."""
        checkpoint.load(models, folder, self._is_engine)

    def _is_engine(self, model: torch.nn.Module) -> bool:
        return any(model is engine for engine in self.engines)


def _is_scheduler(thing: Any) -> bool:
    return isinstance(thing, (DummyScheduler, torch.optim.lr_scheduler.LRScheduler))


def _batch_sizes(request: PrepareRequest) -> list[int]:
    """Return the batch sizes of one process, of the loaders that are being prepared."""
    divisor = request.context.topology.world_size if request.split_batches else 1
    sizes = []
    for thing in request.objects:
        if isinstance(thing, DataLoader):
            size = thing.batch_size or getattr(thing.batch_sampler, "batch_size", None)
            if isinstance(size, int):
                sizes.append(max(1, size // divisor))
    return sizes


def _cast(engine: Any) -> None:
    """Let inputs of the engine have its precision, and its outputs be float32."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else None
    if dtype is None:
        return

    def lower(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype)

    def floating(thing: Any) -> bool:
        return isinstance(thing, torch.Tensor) and thing.is_floating_point()

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return (
            recursively_apply(lower, args, test_type=floating),
            recursively_apply(lower, kwargs, test_type=floating),
        )

    def after(module: torch.nn.Module, args: Any, outputs: Any) -> Any:
        return convert_to_fp32(outputs)

    engine.register_forward_pre_hook(before, with_kwargs=True)
    engine.register_forward_hook(after)


_said: set[str] = set()


def _say(sentence: str) -> None:
    """Tell the user something once, on the main process."""
    runtime = Runtime.current
    if (runtime is None or runtime.topology.rank == 0) and sentence not in _said:
        _said.add(sentence)
        print(f"torchport: {sentence}", file=sys.stderr)  # noqa: T201
