"""FSDP1: the parameters of a unit lie in one flat one (`torch.distributed.fsdp.FullyShardedDataParallel`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import BackwardPrefetch as TorchBackwardPrefetch
from torch.distributed.fsdp import (
    CPUOffload,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torchport.errors import ConfigurationError
from torchport.plugin import Prepared, PrepareRequest, RunContext, shards
from torchport.plugin.binding import bind_step

from torchport_fsdp import config as choices
from torchport_fsdp.clipping import clip_grad_value
from torchport_fsdp.common import ShardedStrategy, offloads, plain_name, policy_fields
from torchport_fsdp.parameters import average_ignored, materialise, own_tensors, place_ignored
from torchport_fsdp.scaling import ShardedScaledStep
from torchport_fsdp.states import numbered
from torchport_fsdp.wrapping import check_shared, ignored_parameters, units

_POLICY = (
    "param_dtype", "reduce_dtype", "buffer_dtype", "keep_low_precision_grads", "cast_forward_inputs",
    "cast_root_forward_inputs",
)  # fmt: skip


class FlatParameterStrategy(ShardedStrategy):
    """`FullyShardedDataParallel` over any backend whose collectives open a process group."""

    _in_host_memory = False

    @property
    def shards(self) -> str:
        """The format of sharded checkpoints; without sharding, states are whole."""
        return "" if self.config.sharding_strategy is choices.ShardingStrategy.NO_SHARD else super().shards

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Wrap models; optimizers that were made before hold the same parameters afterwards."""
        context = request.context
        if request.models and request.optimizers and not self.config.use_orig_params:
            raise ConfigurationError(
                "an optimizer was made before its model is sharded, and use_orig_params=False",
                reason="the model's parameters are replaced by flat ones, which the optimizer does not know",
                hint="use_orig_params=True, or prepare(model), then make the optimizer and prepare(optimizer)",
            )
        self._in_host_memory = context.backend.capabilities().host_memory
        stepped = [(one, one.state_dict()) for one in request.optimizers if request.models and one.state]
        models: list[torch.nn.Module] = []
        for model, place in zip(request.models, request.device_placement, strict=True):
            applied = context.precision.apply(model, context)
            models.append(self._wrap(applied, place, context))
        for optimizer, state in stepped:  # before its parameters became parts of flat ones
            optimizer.state.clear()
            self.load_optimizer_state_dict(_owner(dict(enumerate(models)), optimizer), optimizer, state)
        if context.precision.scaler is not None and context.precision.scaling is None:
            context.precision.scaling = ShardedScaledStep(context.precision.scaler)
        return bind_step(
            request,
            models,
            no_sync=_no_sync,
            clip_grad_norm=_ClipNorm(models),
            clip_grad_value=clip_grad_value,
        )

    def _wrap(self, model: torch.nn.Module, place: bool, context: RunContext) -> torch.nn.Module:
        if isinstance(model, FullyShardedDataParallel):
            return model  # by the user's own hand
        self.check_meta(model)
        self.upcast(model, context)
        config = self.config
        ignored = ignored_parameters(model, config)
        inner = units(model, config, frozenset(id(parameter) for parameter in ignored))
        check_shared(inner, model)
        if config.activation_checkpointing:
            from torchport_fsdp.activations import recompute

            recompute(inner, model)
        home = torch.device("cpu") if config.cpu_offload or not place else context.device
        options, sync = self._options(context, ignored), bool(config.sync_module_states)
        done = {id(parameter) for parameter in ignored}
        materialise(model, ignored, home, from_main=sync)
        if place:
            place_ignored(ignored, context.device)
        average_ignored(ignored, lambda: getattr(wrapped, "_sync_gradients", True))
        wrapped = model
        for module in (*inner, model):
            materialise(module, own_tensors(module, done), home, from_main=sync, init=config.param_init_fn)
            with _quietly():
                wrapped = FullyShardedDataParallel(module, **options)
            done.update(id(parameter) for parameter in wrapped.parameters())
            if module is not model:
                _put_in_place(model, module, wrapped)
        return wrapped

    def _options(self, context: RunContext, ignored: list[torch.nn.Parameter]) -> dict[str, Any]:
        config, device = self.config, context.device
        strategy = config.sharding_strategy or choices.ShardingStrategy.FULL_SHARD
        mesh = self.mesh(context)
        if mesh.size(-1) == 1:  # FSDP1 does not exchange gradients between groups of one
            strategy = choices.ShardingStrategy.NO_SHARD
        options: dict[str, Any] = {
            "sharding_strategy": _sharding(strategy, hybrid=mesh.ndim == 2),
            "forward_prefetch": config.forward_prefetch,
            "backward_prefetch": _backward_prefetch(config.backward_prefetch),
            "limit_all_gathers": config.limit_all_gathers,
            "use_orig_params": bool(config.use_orig_params),
            "cpu_offload": CPUOffload(offload_params=config.cpu_offload and not self._in_host_memory),
            "ignored_states": ignored or None,
            "device_id": device,
        }
        if strategy is not choices.ShardingStrategy.NO_SHARD:
            options["device_mesh"] = mesh
        compute = context.precision.compute_dtype
        fields = policy_fields(config.mixed_precision_policy, compute, _POLICY)
        if fields:
            fields.setdefault("cast_forward_inputs", True)  # of every unit, as FSDP2 does
            options["mixed_precision"] = MixedPrecision(**fields)
        return options

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the user's model, whose parts stay wrapped."""
        if isinstance(model, FullyShardedDataParallel):
            inner: torch.nn.Module = model.module
            return inner
        return model

    @contextmanager
    def trigger_sync_in_backward(self, model: torch.nn.Module) -> Iterator[None]:
        """Let the next backward exchange gradients, though its forwards ran under `no_sync`."""
        parts: list[Any] = FullyShardedDataParallel.fsdp_modules(model)
        before = [part._sync_gradients for part in parts]
        for part in parts:
            part._sync_gradients = True
        try:
            yield
        finally:
            for part, value in zip(parts, before, strict=True):
                part._sync_gradients = value

    def full_parameters(
        self, model: torch.nn.Module, *, writeback: bool = False
    ) -> AbstractContextManager[Any]:
        """Gather all parameters of a model; with `writeback`, keep what every process alike has changed."""
        return FullyShardedDataParallel.summon_full_params(model, writeback=writeback)

    # --- states ------------------------------------------------------------------------------------------

    def _whole(self, model: torch.nn.Module, *, loading: bool = False) -> AbstractContextManager[Any]:
        host, main_only = offloads(self.config.state_dict_config, default=True)
        host_optimizer, main_only_optimizer = offloads(self.config.optim_state_dict_config, default=True)
        # What is in host memory already is not copied by PyTorch, which gives up the memory all the same.
        loading_or_there = loading or self._in_host_memory
        return FullyShardedDataParallel.state_dict_type(
            model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(
                offload_to_cpu=host and not loading_or_there, rank0_only=main_only and not loading
            ),
            FullOptimStateDictConfig(
                offload_to_cpu=host_optimizer and not loading_or_there,
                rank0_only=main_only_optimizer and not loading,
            ),
        )

    @staticmethod
    def _parts(model: torch.nn.Module) -> AbstractContextManager[Any]:
        return FullyShardedDataParallel.state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )

    def model_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the whole state on rank 0, in host memory; nothing on other processes."""
        with _quietly(), self._whole(model):
            return {plain_name(name): value for name, value in model.state_dict().items()}

    def load_model_state_dict(self, model: torch.nn.Module, state: dict[str, Any]) -> Any:
        """Load a whole state, of which each process keeps its part."""
        with _quietly(), self._whole(model, loading=True):
            return model.load_state_dict(state)

    def optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Return the whole state on rank 0, in host memory; on other processes only its settings."""
        with _quietly(), self._whole(model):
            named = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        groups = optimizer.state_dict()["param_groups"]
        if not named:
            return {"state": {}, "param_groups": groups}
        numbers = {name: number for number, name in enumerate(self._names(model, optimizer))}
        return {
            "state": {numbers[plain_name(name)]: slots for name, slots in named["state"].items()},
            "param_groups": groups,
        }

    def load_optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Load a whole state, of which each process keeps its part."""
        with _quietly(), self._whole(model, loading=True):
            self._load_optimizer(model, optimizer, state)

    def _load_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        names = self._names(model, optimizer)
        own = {
            "state": {names[number]: slots for number, slots in state["state"].items()},
            "param_groups": [
                {**group, "params": [names[number] for number in group["params"]]}
                for group in state["param_groups"]
            ],
        }
        flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, own)
        optimizer.load_state_dict(flat)

    def _names(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the names, in the user's own model, of the optimizer's parameters, in their order.

        Raises:
            ConfigurationError: if the optimizer holds flat parameters, of which one has several names.
        """
        if not self.config.use_orig_params:
            raise ConfigurationError(
                "the state of an optimizer over flat parameters cannot be saved or loaded",
                hint="use_orig_params=True",
            )
        named = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
        return [named[id(parameter)] for parameter in numbered(optimizer)]

    def save_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Write this process's part of each state."""
        for index, model in models.items():
            tensors, rest = self._model_parts(model)
            shards.write_shards(tensors, shards.model_folder(folder, index), rest or None)
        for index, optimizer in optimizers.items():
            model = _owner(models, optimizer)
            with _quietly(), self._parts(model):
                named = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            numbers = {name: number for number, name in enumerate(self._names(model, optimizer))}
            state = {numbers[plain_name(name)]: slots for name, slots in named["state"].items()}
            groups = optimizer.state_dict()["param_groups"]
            tensors, rest = shards.split_optimizer_state({"state": state, "param_groups": groups})
            shards.write_shards(tensors, shards.optimizer_folder(folder, index), rest)

    def load_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Read what this process holds, whoever has saved it."""
        for index, model in models.items():
            place = shards.model_folder(folder, index)
            tensors, _ = self._model_parts(model)
            shards.read_shards(tensors, place)
            with _quietly(), self._parts(model):
                model.load_state_dict({**tensors, **(shards.read_plain(place) or {})})
        for index, optimizer in optimizers.items():
            self._load_optimizer_shards(
                _owner(models, optimizer), optimizer, shards.optimizer_folder(folder, index)
            )

    def _model_parts(self, model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with _quietly(), self._parts(model):
            named = {plain_name(name): value for name, value in model.state_dict().items()}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        return tensors, {name: value for name, value in named.items() if name not in tensors}

    def _load_optimizer_shards(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, place: Path
    ) -> None:
        names, (parts, _) = self._names(model, optimizer), self._model_parts(model)
        tensors = {}
        for name, (shape, dtype) in shards.shapes_of(place).items():
            held = parts[names[int(name.split(".", 2)[1])]]
            alike = shape == held.shape
            tensors[name] = torch.empty_like(held, dtype=dtype) if alike else torch.empty(shape, dtype=dtype)
        shards.read_shards(tensors, place)
        with _quietly(), self._parts(model):
            state = shards.join_optimizer_state(tensors, shards.read_plain(place))
            self._load_optimizer(model, optimizer, state)


class _ClipNorm:
    """Clips by total norm: each wrapped model knows the norm of its own sharded gradients."""

    def __init__(self, models: list[torch.nn.Module]) -> None:
        self.models = [model for model in models if isinstance(model, FullyShardedDataParallel)]

    def __call__(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        wanted = {id(parameter) for parameter in parameters}
        for model in self.models:
            if {id(parameter) for parameter in model.parameters()} == wanted:
                return model.clip_grad_norm_(max_norm, norm_type)
        raise ConfigurationError(
            "FSDP1 clips the gradients of one whole model at a time",
            found=f"{len(wanted)} parameters that are not those of a prepared model",
            hint="accelerator.clip_grad_norm_(model.parameters(), ...), or fsdp_version=2",
        )


def _put_in_place(model: torch.nn.Module, module: torch.nn.Module, wrapped: torch.nn.Module) -> None:
    """Put a wrapped module everywhere in a model where the module is."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module and parent is not wrapped:
                parent._modules[name] = wrapped


def _owner(models: Mapping[int, torch.nn.Module], optimizer: torch.optim.Optimizer) -> torch.nn.Module:
    held = {id(parameter) for parameter in numbered(optimizer)}
    return max(models.values(), key=lambda model: sum(id(p) in held for p in model.parameters()))


def _no_sync(model: torch.nn.Module) -> AbstractContextManager[Any]:
    return model.no_sync() if isinstance(model, FullyShardedDataParallel) else nullcontext()


def _sharding(strategy: choices.ShardingStrategy, *, hybrid: bool) -> ShardingStrategy:
    """Return PyTorch's strategy; over one group, the hybrid ones are the plain ones."""
    if strategy.hybrid and not hybrid:
        return ShardingStrategy.FULL_SHARD if strategy.reshards else ShardingStrategy.SHARD_GRAD_OP
    name = (
        "_HYBRID_SHARD_ZERO2" if strategy is choices.ShardingStrategy.HYBRID_SHARD_ZERO2 else strategy.value
    )
    return ShardingStrategy[name]


def _backward_prefetch(choice: choices.BackwardPrefetch | None) -> TorchBackwardPrefetch | None:
    if choice is None or choice is choices.BackwardPrefetch.NO_PREFETCH:
        return None
    return TorchBackwardPrefetch[choice.value]


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out PyTorch's advice to use another interface, which users did not choose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
