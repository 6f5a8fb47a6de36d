"""The façade that users hold: it delegates to the plan's objects and decides nothing by their names."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchport import envvars
from torchport.aliases import STATE_ATTRIBUTES, resolve_keywords, translate_environment
from torchport.checkpoint.control import CheckpointControl
from torchport.checkpoint.project import Checkpoints
from torchport.checkpoint.resume import what_to_resume
from torchport.checkpoint.state import Contents
from torchport.config.dynamo import TorchDynamoPlugin
from torchport.config.kwargs import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    first_of,
    listed,
    read_steps,
)
from torchport.data.prepare import skip_first_batches
from torchport.data.samplers import filling_up
from torchport.distributed_type import DistributedType
from torchport.errors import ConfigurationError
from torchport.exchange_control import ExchangeControl
from torchport.mesh_control import MeshControl
from torchport.plan.selection import Plan, Request
from torchport.plugin.backend import Backend
from torchport.plugin.parallelism import ParallelismConfig
from torchport.plugin.specs import Topology
from torchport.preparation import Preparation
from torchport.process_control import ProcessControl
from torchport.runtime import Runtime
from torchport.state import AcceleratorState, GradientState
from torchport.training.compile import settle
from torchport.training.gradient_control import GradientControl
from torchport.training.join import joining
from torchport.training.optimizer import AcceleratedOptimizer
from torchport.training.random import check_rng_types
from torchport.training.scheduler import AcceleratedScheduler
from torchport.training.tracking import Tracking, separate
from torchport.training.tracking_control import TrackingControl
from torchport.unwrap import finish


class Accelerator(
    ProcessControl, GradientControl, CheckpointControl, TrackingControl, MeshControl, ExchangeControl
):
    """Runs a training or inference script on whatever the plan says.

    Args:
        backend: Name of the backend: which kind of device.
        strategy: Name of the strategy, or an instance of its settings.
        precision: Name of the precision (`"no"`, `"fp16"`, `"bf16"`, …).
        collectives: Name of the collectives.
        trackers: Where metrics go (documented as `log_with`): names, `"all"`, trackers or classes of trackers of the
            script's own, or a list of such.
        device_placement: Whether models and batches are moved to the device.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        gradient_accumulation_plugin: The same, with further settings.
        dataloader_config: How loaders are shared out over processes.
        rng_types: Generators to synchronize over processes at the beginning of each epoch.
        project_dir: Folder of the project.
        project_config: The same, with further settings.
        step_scheduler_with_optimizer: Whether schedulers step when their optimizers do.
        dynamo_backend: Name of the compiler of `torch.compile` for prepared models; `"no"` for none.
        dynamo_plugin: The same, with further settings.
        resume: What `resume()` loads: `"auto"`, the newest complete checkpoint of the project, if there is one; a
            checkpoint's folder; `""`, nothing; `None`, what `TORCHPORT_RESUME` says. `"auto"` numbers checkpoints.
        parallelism_config: How the processes are divided over a mesh of data, tensor, context and sequence
            parallelism; `None` takes what variables say, or else leaves all to the strategy.
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
        trackers: Any = None,
        device_placement: bool = True,
        gradient_accumulation_steps: int | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        dataloader_config: DataLoaderConfiguration | None = None,
        rng_types: Sequence[str] | None = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        step_scheduler_with_optimizer: bool = True,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        resume: str | os.PathLike[str] | None = None,
        parallelism_config: ParallelismConfig | None = None,
        kwargs_handlers: Iterable[Any] | None = None,
        **aliases: Any,
    ) -> None:
        slots = {"backend": backend, "strategy": strategy, "precision": precision, "collectives": collectives}
        handlers = listed(kwargs_handlers)
        slots["collectives"] = collectives or first_of(handlers, InitProcessGroupKwargs).backend
        slots["trackers"] = trackers
        arguments = resolve_keywords(aliases, slots, known=_PARAMETERS)
        if Runtime.current is None:
            GradientState._reset_state()  # what a run that has ended left is not for this one
        names, own_trackers = separate(arguments.pop("trackers", None))
        arguments |= {} if names is None else {"trackers": names}
        request = Request(
            arguments=arguments, asked_by="Accelerator", handlers=handlers, parallelism=parallelism_config
        )
        with Runtime.opening(request) as self._runtime, GradientState._changing():
            self._runtime.check_handlers(handlers)
            self.state = AcceleratorState()
            self.device_placement = device_placement
            self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
            self.dataloader_config = dataloader_config or DataLoaderConfiguration()
            self.rng_types = ("generator",) if rng_types is None else check_rng_types(rng_types, self.device)
            self.project_configuration = project_config or ProjectConfiguration()
            if project_dir is not None or self.project_configuration.project_dir is None:
                self.project_configuration.set_directories(None if project_dir is None else str(project_dir))

            accumulation = _accumulation(gradient_accumulation_steps, gradient_accumulation_plugin)
            self.gradient_state = GradientState(accumulation)
            precision = self._runtime.precision()
            self._context = self._runtime.context(precision, self.gradient_state.num_steps, handlers)
            precision.open(self._context)
            self._autocast: Callable[[], AbstractContextManager[Any]] = precision.forward_context(
                self._context
            )
            self._contents = Contents(self._runtime, self._runtime.strategy(), precision)
            going_on = what_to_resume(resume, self.project_configuration, own=project_config is not None)
            self._checkpoints = Checkpoints(
                self._contents, self.project_configuration, self, going_on, self._discard_gradients
            )
            self._preparation = Preparation(
                self._contents,
                self._context,
                self.gradient_state,
                self.dataloader_config,
                self.rng_types,
                device_placement=device_placement,
                step_scheduler_with_optimizer=step_scheduler_with_optimizer,
                dynamo=settle(dynamo_plugin, dynamo_backend, self.backend),
            )
            self._tracking = Tracking(
                self.plan["trackers"],
                given=own_trackers,
                active=self.is_main_process,
                logging_dir=self.logging_dir,
            )
            self._triggered = False
            self._bind()

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
        return self._context.precision.scaler

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

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether the main process reads all batches and sends out shares."""
        return self.dataloader_config.dispatch_batches

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether shuffling depends on seed and epoch alone."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether copies to the device are asynchronous."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether loaders are torchdata's `StatefulDataLoader`."""
        return self.dataloader_config.use_stateful_dataloader

    def __getattr__(self, name: str) -> Any:
        """Return documented attributes that belong to a strategy, as the state has them."""
        if name in STATE_ATTRIBUTES:
            return getattr(self.state, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

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
        result = self._preparation.all(objects, device_placement)
        self._bind()
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
        prepared = self._preparation.model(model, device_placement, evaluation_mode)
        self._bind()
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Prepare an optimizer alone; its state goes where its parameters are, whatever `device_placement`."""
        prepared = self._preparation.optimizer(optimizer)
        self._bind()
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare a scheduler; its optimizer must have been prepared before, or in the same call."""
        return self._preparation.scheduler(scheduler)

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Prepare a loader: this process's share of it, on its device."""
        return self._preparation.loader(data_loader, device_placement, slice_fn_for_dispatch)

    def _discard_gradients(self) -> None:
        """Begin a new accumulation window without the gradients of the last one."""
        self._preparation.discard_gradients()

    def _bind(self) -> None:
        """Assign the callables of a step."""
        self._bound, self._window = self._preparation.bound, self._preparation.window
        self.backward = self._preparation.backward

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Return a loader without its first batches, which are not read where it has a sampler."""
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(
        self, model: torch.nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> torch.nn.Module:
        """Return the user's model inside a prepared one.

        Args:
            model: A prepared model.
            keep_fp32_wrapper: Whether it stays bound to the precision (until `free_memory`, or until another run
                prepares it); if not, it can be pickled again.
            keep_torch_compile: Whether it stays compiled; if not, and it is, another model over the same parameters
                is returned.
        """
        inner = self._contents.strategy.unwrap(getattr(model, "_orig_mod", model))
        if not keep_fp32_wrapper:
            self._context.precision.restore(inner)
        return finish(model, inner, keep_fp32_wrapper, keep_torch_compile)

    def full_parameters(self, model: torch.nn.Module, writeback: bool = False) -> AbstractContextManager[Any]:
        """Return a context in which a prepared model holds its whole parameters; enter it on every process.

        Args:
            model: A prepared model.
            writeback: Whether changes that every process makes alike are kept.
        """
        return self._contents.strategy.full_parameters(model, writeback=writeback)

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which to make models that the strategy need not have whole on every process."""
        return self._contents.strategy.model_init_context()

    def verify_device_map(self, model: torch.nn.Module) -> bool:
        """Whether a model is spread over several devices by a device map."""
        return any(len(set(getattr(m, "hf_device_map", {}).values())) > 1 for m in model.modules())

    # --- a training step ---------------------------------------------------------------------------------

    def profile(self, profile_handler: ProfileKwargs | None = None) -> AbstractContextManager[Any]:
        """Return a context that records what runs in it (`torch.profiler.profile`), and gives out the profiler.

        Args:
            profile_handler: What to record; by default the handler given to the accelerator.
        """
        from torchport.training.profiling import profile

        handler = profile_handler or first_of(self._context.handlers, ProfileKwargs)
        return profile(handler, self.process_index)

    @contextmanager
    def join_uneven_inputs(
        self, joinables: Iterable[torch.nn.Module], even_batches: bool | None = None
    ) -> Iterator[None]:
        """Let processes have different numbers of batches inside the block.

        Under data parallelism a process without batches leaves the loop, and answers for the others until they have
        none. Where a step takes all processes, and where `gradient_accumulation_steps` is more than 1, it goes on
        with its last batch, which weighs nothing, until all have come to the end of their loaders.

        Args:
            joinables: The prepared models trained in it.
            even_batches: Overrides the loaders' setting in it.
        """
        joined = joining(
            self.gradient_state,
            self._context,
            self._contents.strategy,
            joinables,
            even_batches=even_batches,
            owns_accumulation=self._bound.owns_accumulation,
        )
        with filling_up(self._contents.loaders, even_batches), joined:
            yield

    # --- the end -----------------------------------------------------------------------------------------

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything prepared and return cached memory to the device.

        Models get their own `forward` back: used on, they compute outside the run's precision.

        Args:
            *objects: The caller's own references, as many as to be replaced by the `None`s returned.
        """
        self._preparation.clear()
        self._checkpoints.release()
        self._bind()
        gc.collect()
        self.backend.empty_cache()
        return [None] * len(objects)

    def clear(self, *objects: Any) -> list[None]:
        """Another name of `free_memory`."""
        return self.free_memory(*objects)

    def end_training(self) -> None:
        """Close the trackers, wait for the last checkpoint and for everyone, and leave the process group.

        What takes several processes raises an `OperationError` from now on (`gather`, `save_state`, ...).

        Raises:
            CheckpointError: if a checkpoint could not be saved in the background.
        """
        self._tracking.close()
        try:
            self.wait_for_checkpoint()
        finally:
            self._checkpoints.release()
            if not self._runtime.closed:
                self.wait_for_everyone()
                self._runtime.close()


_PARAMETERS = (
    "device_placement", "gradient_accumulation_steps", "gradient_accumulation_plugin", "dataloader_config",
    "rng_types", "project_dir", "project_config", "step_scheduler_with_optimizer", "dynamo_backend",
    "dynamo_plugin", "resume", "parallelism_config", "kwargs_handlers",
)  # fmt: skip


def _accumulation(
    steps: int | None, plugin: GradientAccumulationPlugin | None
) -> GradientAccumulationPlugin | None:
    """Settle the settings of gradient accumulation: the plugin's, the argument's, or the variable's.

    `None` where nobody asks for any: then those of the run that is open stay.
    """
    if plugin is not None and plugin.num_steps is not None and steps not in (None, 1, plugin.num_steps):
        raise ConfigurationError(
            f"gradient_accumulation_steps={steps} and GradientAccumulationPlugin(num_steps={plugin.num_steps})",
            hint="give one of the two",
        )
    if plugin is None and steps is None and GradientState.started():
        return None
    plugin = plugin or GradientAccumulationPlugin()
    if plugin.num_steps is None:
        if steps is None:
            text = translate_environment(os.environ).get(envvars.ACCUMULATION_STEPS) or "1"
            plugin.num_steps = read_steps(int(text) if text.isdigit() else text, envvars.ACCUMULATION_STEPS)
        else:
            plugin.num_steps = read_steps(steps, "gradient_accumulation_steps")
    return plugin
