"""The interface to a layout of model, optimizer and gradients over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchport.plugin.parallelism import ParallelismConfig
from torchport.plugin.specs import StrategySpec, Topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from torchport.plugin.context import RunContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """What a call of `Accelerator.prepare` hands to the strategy.

    Attributes:
        models: Models as the user made them, on any device.
        optimizers: Optimizers over the parameters of these (or earlier prepared) models.
        context: The run.
        device_placement: For each model, whether to move it to the device.
        evaluation_only: Whether the models will not be trained, so that no gradients need be exchanged.
        objects: Everything given to the same call of `prepare`, in order: also the schedulers, and the loaders,
            whose batch size an engine may want to know.
        split_batches: Whether the batch size of a loader is that of all processes together.
    """

    models: tuple[torch.nn.Module, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    context: RunContext
    device_placement: tuple[bool, ...] = ()
    evaluation_only: bool = False
    objects: tuple[Any, ...] = ()
    split_batches: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The wrapped objects and the bound callables of a training step.

    `Accelerator` assigns the callables once; a step then calls them directly, with no look-up and no branch.

    Attributes:
        models: One for each requested model, in order.
        optimizers: One for each requested optimizer, in order.
        backward: Computes gradients of a loss: `backward(loss, **kwargs)`.
        step: Steps one of `optimizers`, `step(optimizer, closure)`, and returns whether it was applied
            (a loss scaler may skip it).
        zero_grad: Clears the gradients of one of `optimizers`: `zero_grad(optimizer, set_to_none)`.
        no_sync: A context in which gradients of a model are kept local: `no_sync(model)`.
        clip_grad_norm: Clips to a total norm, after dividing the loss scale out, and returns the norm before:
            `clip_grad_norm(parameters, max_norm, norm_type)`.
        clip_grad_value: Clips each element, after dividing the loss scale out: `clip_grad_value(parameters, value)`.
        gradients: Returns the gradients that this process holds of some models, or, given none, of all models and
            optimizers: `gradients(models)`. They are averaged over processes after a backward that synchronizes.
        unscale_gradients: Divides the loss scale out of the gradients of one optimizer, or of all (`None`).
        owns_accumulation: Whether the strategy counts and averages micro-batches itself.
        schedulers: Schedulers that the strategy steps by itself, by the `id` of the one in the request's objects.
            The others follow their optimizers.
    """

    models: tuple[torch.nn.Module, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    backward: Callable[..., None]
    step: Callable[[torch.optim.Optimizer, Callable[[], Any] | None], bool]
    zero_grad: Callable[[torch.optim.Optimizer, bool], None]
    no_sync: Callable[[torch.nn.Module], AbstractContextManager[Any]]
    clip_grad_norm: Callable[[Iterable[torch.Tensor], float, float], torch.Tensor]
    clip_grad_value: Callable[[Iterable[torch.Tensor], float], None]
    gradients: Callable[[Sequence[torch.nn.Module]], list[torch.Tensor]]
    unscale_gradients: Callable[[torch.optim.Optimizer | None], None]
    owns_accumulation: bool = False
    schedulers: Mapping[int, Any] = field(default_factory=dict)


class Strategy(ABC):
    """A layout of model, optimizer and gradients over processes.

    Attributes:
        parallelism: The mesh that the plan asks for, if any; set by the run before anything is prepared.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    def __init__(self, spec: StrategySpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config
        self.parallelism: ParallelismConfig | None = None
        self._device_mesh: DeviceMesh | None = None

    @property
    def supports_local_steps(self) -> bool:
        """Whether each process holds a whole replica, which may train apart from the others for some steps."""
        return False

    @property
    def steps_together(self) -> bool:
        """Whether no process can take a step apart from the others: the run lends it batches that weigh nothing."""
        return False

    @property
    def shards(self) -> str:
        """The format in which each process saves its own part of the states; empty where the main one saves all."""
        return ""

    @abstractmethod
    def prepare(self, request: PrepareRequest) -> Prepared:
        """Distribute models and optimizers, and bind the callables of a step."""

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the user's model inside what `prepare` made of it."""
        return model

    def model_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the whole state of a prepared model, under the names of the user's own model."""
        return self.unwrap(model).state_dict()

    def load_model_state_dict(self, model: torch.nn.Module, state: dict[str, Any]) -> Any:
        """Load what `model_state_dict` returned; call it on every process."""
        return self.unwrap(model).load_state_dict(state)

    def optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Return the state of a prepared optimizer over the parameters of `model`."""
        return optimizer.state_dict()

    def load_optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Load what `optimizer_state_dict` returned; call it on every process."""
        optimizer.load_state_dict(state)

    def discard_gradients(self, models: Sequence[torch.nn.Module]) -> None:
        """Forget gradients of the current accumulation window that clearing those of the optimizers leaves.

        Called on each process when a state has been loaded.

        Args:
            models: The prepared models.
        """

    def begin_save(self) -> None:
        """Be told on each process that a checkpoint is about to be saved, before the processes exchange anything.

        A strategy whose saves take every process can raise here where some do not come.
        """

    def save_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Write this process's part of the states into `folder`, where `shards` names a format.

        Args:
            models: Prepared models, by their number in the checkpoint.
            optimizers: Prepared optimizers, by theirs.
            folder: An existing folder that all processes write into.
        """
        raise NotImplementedError

    def load_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Load what `save_shards` wrote, by this or another number of processes; call it on every process."""
        raise NotImplementedError

    def full_parameters(
        self, model: torch.nn.Module, *, writeback: bool = False
    ) -> AbstractContextManager[Any]:
        """Return a context in which a prepared model holds its whole parameters on every process.

        Args:
            model: A prepared model.
            writeback: Whether changes made to them on every process alike are kept.
        """
        return nullcontext()

    def data_share(self, topology: Topology) -> tuple[int, int]:
        """Return which of how many different batches of a step this process reads: `(index, count)`."""
        if self.parallelism is not None:
            return self.parallelism.data_share(topology)
        return topology.rank, topology.world_size

    def device_mesh(self, context: RunContext) -> DeviceMesh | None:
        """Return the mesh of the run, whose dimensions have the names of the plan's; `None` where it asks for none."""
        if self.parallelism is not None and self._device_mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            sizes = self.parallelism.active
            self._device_mesh = init_device_mesh(
                context.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
            )
        return self._device_mesh

    def context_parallel(
        self,
        context: RunContext,
        buffers: Sequence[torch.Tensor],
        buffer_seq_dims: Sequence[int],
        no_restore_buffers: Collection[torch.Tensor],
    ) -> AbstractContextManager[Any]:
        """Return a context in which this process has its part of sequences, and attention sees all of them.

        It is asked for only where the plan spreads sequences (`cp` or `sp`).

        Args:
            context: The run.
            buffers: Tensors with a dimension along sequences; inside, each holds this process's part.
            buffer_seq_dims: That dimension of each.
            no_restore_buffers: Those that need not be whole again afterwards.
        """
        raise NotImplementedError

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which to construct models too large for one process."""
        return nullcontext()

    def trigger_sync_in_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a context whose backward exchanges gradients of forwards that ran under `no_sync`."""
        return nullcontext()

    def join(
        self, models: Iterable[torch.nn.Module], *, even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        """Return a context in which processes may have different numbers of batches."""
        return nullcontext()
