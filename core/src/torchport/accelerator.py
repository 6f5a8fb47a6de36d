"""The façade that users hold: it delegates to the plan's objects and decides nothing by their names."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchport import envvars
from torchport.aliases import resolve_keywords
from torchport.checkpoint import state as checkpoint
from torchport.config.kwargs import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
from torchport.data.loader import prepare_data_loader
from torchport.data.samplers import BatchSamplerShard
from torchport.distributed_type import DistributedType
from torchport.errors import CheckpointError, ConfigurationError
from torchport.ops import exchange
from torchport.ops.pytree import is_tensor, recursively_apply, slice_tensors
from torchport.plan.selection import Plan, Request
from torchport.plugin.backend import Backend
from torchport.plugin.specs import Topology
from torchport.plugin.strategy import Prepared, PrepareRequest
from torchport.process_control import ProcessControl
from torchport.runtime import Runtime
from torchport.state import AcceleratorState, GradientState
from torchport.training.accumulation import AccumulationWindow
from torchport.training.optimizer import AcceleratedOptimizer
from torchport.training.scheduler import AcceleratedScheduler


class Accelerator(ProcessControl):
    """Runs a training or inference script on whatever the plan says.

    Args:
        backend: Name of the backend: which kind of device.
        strategy: Name of the strategy, or an instance of its settings.
        precision: Name of the precision (`"no"`, `"fp16"`, `"bf16"`, …).
        collectives: Name of the collectives.
        device_placement: Whether models and batches are moved to the device.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        gradient_accumulation_plugin: The same, with further settings.
        dataloader_config: How loaders are shared out over processes.
        rng_types: Generators to synchronize over processes at the beginning of each epoch.
        project_dir: Folder of the project.
        project_config: The same, with further settings.
        step_scheduler_with_optimizer: Whether schedulers step when their optimizers do.
        kwargs_handlers: Settings of PyTorch objects and of the chosen plugins.
        **aliases: Documented older spellings (`mixed_precision`, `cpu`, …), see `docs/environment.md`.

    Raises:
        SelectionError: if a slot of the plan cannot be filled.
        PlanMismatchError: if the processes of the job disagree.
    """

    backward: Callable[..., None]
    """Compute gradients of a loss: `backward(loss, **kwargs)`.

    The loss (a tensor of one element) is divided or weighted as its accumulation window asks for; `kwargs` go
    to `torch.Tensor.backward`. This is the strategy's own callable, bound by `prepare`.
    """

    def __init__(
        self,
        *,
        backend: Any = None,
        strategy: Any = None,
        precision: Any = None,
        collectives: Any = None,
        device_placement: bool = True,
        gradient_accumulation_steps: int | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        dataloader_config: DataLoaderConfiguration | None = None,
        rng_types: Sequence[str] | None = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Iterable[Any] | None = None,
        **aliases: Any,
    ) -> None:
        slots = {"backend": backend, "strategy": strategy, "precision": precision, "collectives": collectives}
        keywords = resolve_keywords(aliases, slots, known=_PARAMETERS)
        handlers = (*(kwargs_handlers or ()), *keywords.handlers)
        request = Request(arguments=keywords.slots, asked_by="Accelerator", handlers=handlers)
        self._runtime = Runtime.open(request)
        self.state = AcceleratorState()
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.rng_types = tuple(rng_types) if rng_types is not None else ("generator",)
        self.project_configuration = project_config or ProjectConfiguration()
        if project_dir is not None or self.project_configuration.project_dir is None:
            self.project_configuration.set_directories(None if project_dir is None else str(project_dir))

        accumulation = _accumulation(gradient_accumulation_steps, gradient_accumulation_plugin)
        self.gradient_state = GradientState(accumulation)
        self._precision = self._runtime.precision()
        self._context = self._runtime.context(self._precision, self.gradient_state.num_steps, handlers)
        self._precision.open(self._context)
        self._strategy = self._runtime.strategy()
        marks_steps = type(self._runtime.backend).step_boundary is not Backend.step_boundary
        self._window = AccumulationWindow(
            self.gradient_state, self._context, self._runtime.backend.step_boundary if marks_steps else None
        )
        self._autocast = self._precision.forward_context(self._context)
        self._contents = checkpoint.Contents(self._runtime, self._strategy, self._precision)
        self._save_hooks: list[Callable[..., Any]] = []
        self._load_hooks: list[Callable[..., Any]] = []
        self._triggered = False
        self._bind(self._strategy.prepare(PrepareRequest(models=(), optimizers=(), context=self._context)))

    # --- the run -----------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The frozen choices of the run, and why each was made."""
        return self._runtime.plan

    @property
    def topology(self) -> Topology:
        """The place of this process in the job."""
        return self._runtime.topology

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._runtime.device

    @property
    def backend(self) -> Backend:
        """The backend object."""
        return self._runtime.backend

    @property
    def distributed_type(self) -> DistributedType:
        """The kind of distributed training."""
        return DistributedType(self.plan.distributed_type)

    @property
    def mixed_precision(self) -> str:
        """Name of the precision."""
        return self.plan.precision

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler, where the precision has one."""
        return self._precision.scaler

    @property
    def project_dir(self) -> str | None:
        """Folder of the project."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Folder for trackers."""
        return self.project_configuration.logging_dir

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch size is that of all processes together."""
        return self.dataloader_config.split_batches

    @property
    def even_batches(self) -> bool:
        """Whether samples from the beginning fill up the last batches."""
        return self.dataloader_config.even_batches

    # --- preparing ---------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Prepare models, optimizers, schedulers and loaders, in any order and any number.

        Args:
            *objects: What to prepare; anything else is given back as it is.
            device_placement: For each object, whether to move it to the device; `None` takes the default.

        Returns:
            The prepared objects in the same order; a single one alone.

        Raises:
            ConfigurationError: if `device_placement` has another length.
        """
        placement = list(device_placement) if device_placement is not None else [None] * len(objects)
        if len(placement) != len(objects):
            raise ConfigurationError(
                f"device_placement has {len(placement)} values for {len(objects)} objects", hint="one for each"
            )
        places = [self.device_placement if place is None else place for place in placement]
        result = list(objects)
        new_models = [i for i, o in enumerate(objects) if isinstance(o, torch.nn.Module) and not self._is_prepared(o)]
        new_optimizers = [
            i
            for i, o in enumerate(objects)
            if isinstance(o, torch.optim.Optimizer) and not isinstance(o, AcceleratedOptimizer)
        ]
        if new_models or new_optimizers:
            prepared = self._prepare_step(
                [objects[i] for i in new_models], [objects[i] for i in new_optimizers], [places[i] for i in new_models]
            )
            for i, model in zip(new_models, prepared.models, strict=True):
                result[i] = model
            for i, optimizer in zip(new_optimizers, self._wrap_optimizers(prepared), strict=True):
                result[i] = optimizer
        for i, thing in enumerate(objects):
            if isinstance(thing, DataLoader):
                result[i] = self.prepare_data_loader(thing, device_placement=places[i])
            elif _is_scheduler(thing):
                result[i] = self.prepare_scheduler(thing)
        return result[0] if len(result) == 1 else tuple(result)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Prepare a model alone.

        Args:
            model: The model.
            device_placement: Whether to move it to the device.
            evaluation_mode: Whether it will not be trained, so that no gradients need be exchanged.
        """
        if self._is_prepared(model):
            return model
        place = self.device_placement if device_placement is None else device_placement
        return self._prepare_step([model], [], [place], evaluation_mode).models[0]

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Prepare an optimizer alone."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        return self._wrap_optimizers(self._prepare_step([], [optimizer], []))[0]

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare a scheduler; its optimizer must have been prepared before, or in the same call."""
        if isinstance(scheduler, AcceleratedScheduler):
            return scheduler
        mine = [o for o in self._contents.optimizers if scheduler.optimizer in (o, o.optimizer)]
        steps = 1 if self.split_batches else self.num_processes
        wrapped = AcceleratedScheduler(
            scheduler,
            mine or self._contents.optimizers,
            self.gradient_state,
            step_with_optimizer=self.step_scheduler_with_optimizer,
            steps_per_update=steps,
        )
        if steps > 1 and self.step_scheduler_with_optimizer and not self._contents.schedulers:
            self._note(
                f"schedulers step {steps} times for each optimizer step, as one process would have over the same"
                " data; DataLoaderConfiguration(split_batches=True) keeps batch size and steps as they are"
            )
        self._contents.schedulers.append(wrapped)
        return wrapped

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Prepare a loader: this process's share of it, on its device."""
        if data_loader in self._contents.loaders:
            return data_loader
        config = self.dataloader_config
        loader = prepare_data_loader(
            data_loader,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=self.rng_types,
            split_batches=config.split_batches,
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
        )
        prepared = self.backend.wrap_dataloader(loader, self.device)
        self._contents.loaders.append(prepared)
        return prepared

    def _prepare_step(
        self,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        places: Sequence[bool],
        evaluation_only: bool = False,
    ) -> Prepared:
        prepared = self._strategy.prepare(
            PrepareRequest(
                models=tuple(models),
                optimizers=tuple(self._precision.convert_optimizer(o) for o in optimizers),
                context=self._context,
                device_placement=tuple(places),
                evaluation_only=evaluation_only,
            )
        )
        self._contents.models.extend(prepared.models)
        self._bind(prepared)
        return prepared

    def _bind(self, prepared: Prepared) -> None:
        """Assign the callables of a step, once."""
        self._bound = prepared
        self._window.bind(prepared)
        self.backward = prepared.backward if prepared.owns_accumulation else self._window.backward

    def _wrap_optimizers(self, prepared: Prepared) -> list[AcceleratedOptimizer]:
        wrapped = [AcceleratedOptimizer(optimizer, prepared, self.gradient_state) for optimizer in prepared.optimizers]
        self._contents.optimizers.extend(wrapped)
        return wrapped

    def _is_prepared(self, model: torch.nn.Module) -> bool:
        return any(model is known for known in self._contents.models)

    def unwrap_model(
        self, model: torch.nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> torch.nn.Module:
        """Return the user's model inside a prepared one.

        Args:
            model: A prepared model.
            keep_fp32_wrapper: Whether it stays bound to the precision; if not, it can be pickled again.
            keep_torch_compile: Whether it stays compiled.
        """
        compiled = getattr(model, "_orig_mod", None)
        inner = self._strategy.unwrap(model if compiled is None else compiled)
        if not keep_fp32_wrapper:
            self._precision.restore(inner)
        if compiled is not None and keep_torch_compile and inner is compiled:
            return model
        return inner

    def verify_device_map(self, model: torch.nn.Module) -> bool:
        """Whether a model is spread over several devices by a device map."""
        return any(len(set(getattr(m, "hf_device_map", {}).values())) > 1 for m in model.modules())

    # --- a training step ---------------------------------------------------------------------------------

    def accumulate(
        self, *models: torch.nn.Module, num_items: Any = None, reduction: str = "mean"
    ) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch.

        Inside it, `optimizer.step()`, `scheduler.step()` and `optimizer.zero_grad()` do their work on the last
        micro-batch of each accumulation window and nothing on the others.

        Args:
            *models: The models trained in it.
            num_items: Number of items (tokens, pixels, …) that the loss of this micro-batch is about: a number or
                a tensor without dimensions. Given, every item of the window weighs the same over all
                micro-batches and processes, as in one big batch; if not, every micro-batch does.
            reduction: `"mean"` if the loss is the mean over `num_items`, `"sum"` if it is their sum.
        """
        return self._window.begin(models, num_items, reduction)

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch ends its accumulation window."""
        return bool(self.gradient_state.sync_gradients)

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._window.steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self.gradient_state.plugin.num_steps = self._window.steps = self._window.divisor = self._window.size = value

    def no_sync(self, model: torch.nn.Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which the gradients of a model stay on this process."""
        return self._bound.no_sync(model if model is not None else torch.nn.Module())

    def trigger_sync_in_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a context whose backward exchanges gradients of forwards that ran under `no_sync`."""
        return self._strategy.trigger_sync_in_backward(model)

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[Any]:
        """Return a context in which operations run in the run's precision, for code outside of models."""
        if autocast_handler is not None:
            return self._precision.forward_context(self._context, autocast_handler)()
        return self._autocast()

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor] | torch.Tensor, max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """Clip gradients to a total norm (`torch.nn.utils.clip_grad_norm_`), after dividing the loss scale out.

        Returns:
            The total norm before clipping: a tensor without dimensions.
        """
        self._bound.unscale_gradients(None)
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        return self._bound.clip_grad_norm(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor] | torch.Tensor, clip_value: float) -> None:
        """Clip each element of the gradients (`torch.nn.utils.clip_grad_value_`)."""
        self._bound.unscale_gradients(None)
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self._bound.clip_grad_value(parameters, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide the loss scale out of the gradients of some optimizers, or of all."""
        chosen = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for one in chosen:
            self._bound.unscale_gradients(one.optimizer if isinstance(one, AcceleratedOptimizer) else one)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any optimizer was skipped, because a gradient overflowed."""
        return any(optimizer.step_was_skipped for optimizer in self._contents.optimizers)

    @contextmanager
    def join_uneven_inputs(
        self, joinables: Iterable[torch.nn.Module], even_batches: bool | None = None
    ) -> Iterator[None]:
        """Let processes have different numbers of batches inside the block.

        Args:
            joinables: The prepared models trained in it.
            even_batches: Overrides the loaders' setting in it.
        """
        samplers = [s for s in (getattr(x, "batch_sampler", None) for x in self._contents.loaders) if isinstance(s, BatchSamplerShard)]
        before = [sampler.even_batches for sampler in samplers]
        for sampler in samplers if even_batches is not None else ():
            sampler.even_batches = bool(even_batches)
        try:
            with self._strategy.join(joinables, even_batches=even_batches):
                yield
        finally:
            for sampler, value in zip(samplers, before, strict=True):
                sampler.even_batches = value

    # --- exchanging --------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Concatenate tensors of all processes along the first dimension; see `torchport.utils.gather`."""
        return exchange.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather results of a batch, without those of samples that only filled up the last round.

        Args:
            input_data: Tensors (of one shape on all processes), or picklable objects.
            use_gather_object: Whether to gather tensors as objects, in a list.
        """
        leaves: list[bool] = []
        recursively_apply(lambda leaf: leaves.append(is_tensor(leaf)), input_data, test_type=lambda v: not isinstance(v, (list, tuple, dict)))
        as_objects = use_gather_object or not leaves or not all(leaves)
        data = exchange.gather_object(input_data) if as_objects else exchange.gather(input_data)
        remainder = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else -1
        if remainder <= 0:
            return data
        return data[:remainder] if as_objects else slice_tensors(data, slice(remainder))

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce tensors over all processes; see `torchport.utils.reduce`."""
        return exchange.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors to the largest size over all processes; see `torchport.utils.pad_across_processes`."""
        return exchange.pad_across_processes(tensor, dim, pad_index, pad_first)

    def set_trigger(self) -> None:
        """Raise a flag on this process, which `check_trigger` reports on all."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has called `set_trigger` since the last check; the flag is lowered."""
        mine, self._triggered = torch.tensor(int(self._triggered), device=self.device), False
        return bool(exchange.reduce(mine, "sum") > 0)

    # --- saving ------------------------------------------------------------------------------------------

    def save_state(self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True) -> str:
        """Save everything prepared and registered; call it on every process.

        The folder appears when it is complete, or not at all: a crash leaves the previous one whole.

        Args:
            output_dir: The folder; with automatic naming, leave it out.
            safe_serialization: Whether weights are written as safetensors.

        Returns:
            The folder.

        Raises:
            CheckpointError: on every process, if any could not write its part.
        """
        project = self.project_configuration
        target = self._checkpoint_folder(output_dir)
        for hook in self._save_hooks:
            hook(self._contents.models, [], str(target))
        leader = self.is_local_main_process if project.save_on_each_node else self.is_main_process
        facts = {
            "plan": self.plan.fingerprint(),
            "world_size": self.num_processes,
            "objects": checkpoint.counts(self._contents),
            "iteration": project.iteration,
        }
        checkpoint.save(self._contents, target, safe_serialization=safe_serialization, leader=leader, facts=facts)
        if project.automatic_checkpoint_naming:
            if leader and project.total_limit is not None:
                checkpoint.make_room(target.parent, project.total_limit + 1)
            project.iteration += 1
        return str(target)

    def load_state(self, input_dir: str | os.PathLike[str] | None = None) -> None:
        """Load what `save_state` saved, after verifying it; call it on every process.

        Args:
            input_dir: The folder; with automatic naming, left out, the newest complete one.

        Raises:
            CheckpointError: if it is incomplete, damaged, or was made of other objects; nothing is loaded then.
        """
        project = self.project_configuration
        if input_dir is None and not project.automatic_checkpoint_naming:
            raise CheckpointError("load_state needs a folder", hint="load_state('folder'), or automatic naming")
        source = checkpoint.newest(self._checkpoints) if input_dir is None else Path(input_dir)
        for hook in self._load_hooks:
            hook(self._contents.models, str(source))
        manifest = checkpoint.load(self._contents, source)
        if project.automatic_checkpoint_naming:
            project.iteration = int(manifest.get("iteration", -1)) + 1

    @property
    def _checkpoints(self) -> Path:
        return Path(self.project_dir or ".") / "checkpoints"

    def _checkpoint_folder(self, output_dir: str | os.PathLike[str] | None) -> Path:
        project = self.project_configuration
        if output_dir is not None:
            return Path(output_dir).absolute()
        if not project.automatic_checkpoint_naming:
            raise CheckpointError(
                "save_state needs a folder",
                hint="save_state('folder'), or ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True)",
            )
        target = self._checkpoints / f"checkpoint_{project.iteration}"
        if target.exists():
            raise CheckpointError(
                f"{target} exists already",
                reason="automatic naming never overwrites a checkpoint",
                hint="load_state() before training continues, another project_dir, or a higher `iteration`",
            )
        return target.absolute()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load further objects, which have `state_dict` and `load_state_dict`.

        Raises:
            ConfigurationError: if one lacks either.
        """
        for thing in objects:
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise ConfigurationError(
                    f"a {type(thing).__name__} cannot be registered for checkpoints",
                    reason="it has no state_dict() or no load_state_dict()",
                )
        self._contents.custom.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook(models, weights, output_dir)` before each `save_state`; returns a handle with `remove`."""
        return _registered(self._save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook(models, input_dir)` before each `load_state`; returns a handle with `remove`."""
        return _registered(self._load_hooks, hook)

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Return the whole state of a prepared model; call it on every process."""
        return self._strategy.model_state_dict(model)

    def save(self, obj: Any, f: str | os.PathLike[str], safe_serialization: bool = False) -> None:
        """Write an object on the main process, with `torch.save` or (tensors by name) as safetensors."""
        leader = self.is_local_main_process if self.project_configuration.save_on_each_node else self.is_main_process
        if leader and safe_serialization:
            from torchport.checkpoint.weights import save_weights

            save_weights(obj, Path(f))
        elif leader:
            self.backend.save(obj, Path(f))

    # --- the end -----------------------------------------------------------------------------------------

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything prepared and return cached memory to the device.

        Args:
            *objects: The caller's own references, as many as to be replaced by the `None`s returned.
        """
        for held in (self._contents.models, self._contents.optimizers, self._contents.schedulers, self._contents.loaders):
            held.clear()
        self._window = AccumulationWindow(self.gradient_state, self._context, self._window.on_exit)
        self._precision.scaling = None
        self._bind(self._strategy.prepare(PrepareRequest(models=(), optimizers=(), context=self._context)))
        gc.collect()
        self.backend.empty_cache()
        return [None] * len(objects)

    def clear(self, *objects: Any) -> list[None]:
        """Another name of `free_memory`."""
        return self.free_memory(*objects)

    def end_training(self) -> None:
        """Wait for everyone and leave the process group."""
        self.wait_for_everyone()
        self._runtime.close()

    def _note(self, sentence: str) -> None:
        if self.is_main_process:
            print(f"torchport: {sentence}", file=sys.stderr)  # noqa: T201


_PARAMETERS = (
    "device_placement", "gradient_accumulation_steps", "gradient_accumulation_plugin", "dataloader_config",
    "rng_types", "project_dir", "project_config", "step_scheduler_with_optimizer", "kwargs_handlers",
)  # fmt: skip


def _accumulation(steps: int | None, plugin: GradientAccumulationPlugin | None) -> GradientAccumulationPlugin:
    """Settle the settings of gradient accumulation: the plugin's, the argument's, or the variable's."""
    if plugin is not None and plugin.num_steps is not None and steps not in (None, 1, plugin.num_steps):
        raise ConfigurationError(
            f"gradient_accumulation_steps={steps} and GradientAccumulationPlugin(num_steps={plugin.num_steps})",
            hint="give one of the two",
        )
    plugin = plugin or GradientAccumulationPlugin()
    if plugin.num_steps is None:
        text = os.environ.get(envvars.ACCUMULATION_STEPS) or "1"
        if steps is None and not text.isdigit():
            raise ConfigurationError(f"{envvars.ACCUMULATION_STEPS} must be a whole number", found=repr(text))
        plugin.num_steps = int(text) if steps is None else steps
    if plugin.num_steps < 1:
        raise ConfigurationError(f"gradient_accumulation_steps must be at least 1, found {plugin.num_steps}")
    return plugin


def _is_scheduler(thing: Any) -> bool:
    return isinstance(thing, torch.optim.lr_scheduler.LRScheduler) or (
        hasattr(thing, "step") and hasattr(thing, "optimizer") and hasattr(thing, "state_dict")
        and not isinstance(thing, (torch.nn.Module, torch.optim.Optimizer, AcceleratedScheduler))
    )


class _Handle:
    """Takes a registered hook out again."""

    def __init__(self, hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Take the hook out."""
        self._hooks.remove(self._hook)


def _registered(hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> _Handle:
    hooks.append(hook)
    return _Handle(hooks, hook)
