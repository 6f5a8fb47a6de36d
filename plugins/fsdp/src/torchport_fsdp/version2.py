"""FSDP2: every parameter is a `DTensor` that is spread over the processes (`torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchport.plugin import Prepared, PrepareRequest, RunContext, StrategySpec
from torchport.plugin.binding import bind_step

from torchport_fsdp import states
from torchport_fsdp.activations import recompute
from torchport_fsdp.clipping import clip_grad_norm, clip_grad_value
from torchport_fsdp.common import ShardedStrategy, offloads, policy_fields
from torchport_fsdp.config import BackwardPrefetch, FullyShardedDataParallelPlugin
from torchport_fsdp.parameters import (
    Successors,
    average_ignored,
    gather_spread,
    local_of,
    materialise,
    own_tensors,
    place_ignored,
    switch_parameters,
)
from torchport_fsdp.sequences import spread_sequences
from torchport_fsdp.tensor_parallel import spread, styles_of
from torchport_fsdp.wrapping import check_shared, ignored_parameters, inside, units

_POLICY = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")


class FullyShardStrategy(ShardedStrategy):
    """`fully_shard` over any backend whose collectives open a process group."""

    def __init__(self, spec: StrategySpec, config: FullyShardedDataParallelPlugin | None = None) -> None:
        super().__init__(spec, config)
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Shard models, and let optimizers that were made before go on with the sharded parameters."""
        models = []
        for model, place in zip(request.models, request.device_placement, strict=True):
            applied = request.context.precision.apply(model, request.context)
            self._shard(inside(applied), place, request.context)
            models.append(applied)
        self._optimizers.update(request.optimizers)
        for optimizer in self._optimizers:  # also those that were prepared before their model
            switch_parameters(optimizer)
        return bind_step(
            request,
            models,
            no_sync=no_sync,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            local=local_of,
        )

    def _shard(self, model: torch.nn.Module, place: bool, context: RunContext) -> None:
        if isinstance(model, FSDPModule):
            return  # by the user's own hand
        self.check_meta(model)
        self.upcast(model, context)
        config, mesh, layout = self.config, self.mesh(context), self.layout(context)
        styles = {} if self.parallelism is None else styles_of(model, self.parallelism)
        ignored = ignored_parameters(model, config)
        kept = frozenset(id(parameter) for parameter in ignored)
        inner = units(model, config, kept)
        check_shared(inner, model)
        if config.activation_checkpointing:
            recompute(inner, model)
        options = self._options(context, ignored)
        home = torch.device("cpu") if config.cpu_offload or not place else context.device
        successors, done = Successors(ignored), set(kept)
        materialise(model, ignored, home, from_main=bool(config.sync_module_states))
        for module in (*inner, model):
            own = own_tensors(module, done)
            materialise(
                module, own, home, from_main=bool(config.sync_module_states), init=config.param_init_fn
            )
            if module is not model or config.reshard_after_forward is not True:
                options["reshard_after_forward"] = config.reshard_after_forward
            else:  # PyTorch's default: the outermost unit is needed again at once, by the backward
                options.pop("reshard_after_forward", None)

            def divide(module: torch.nn.Module = module) -> None:
                if layout is not None and layout.tensor is not None:
                    spread(module, styles, layout.tensor)
                fully_shard(module, mesh=mesh, **options)

            successors.shard(module, divide)
            done.update(id(parameter) for parameter in module.parameters())
        if place:
            place_ignored(ignored, context.device)
        average_ignored(ignored, lambda: _syncs(model))
        _prefetch([*inner, model], self.config.forward_prefetch, self.config.backward_prefetch)

    def _options(self, context: RunContext, ignored: list[torch.nn.Parameter]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        fields = policy_fields(self.config.mixed_precision_policy, context.precision.compute_dtype, _POLICY)
        if fields:
            options["mp_policy"] = MixedPrecisionPolicy(**fields)
        if self.config.cpu_offload:
            pinned = context.backend.capabilities().pinned_memory
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
        if ignored:
            options["ignored_params"] = set(ignored)
        return options

    @contextmanager
    def trigger_sync_in_backward(self, model: torch.nn.Module) -> Iterator[None]:
        """Let the next backward exchange gradients, though its forwards ran under `no_sync`."""
        model = inside(model)
        if not isinstance(model, FSDPModule):
            yield
            return
        before = _syncs(model)
        _set_sync(model, True)
        try:
            yield
        finally:
            _set_sync(model, before)

    @contextmanager
    def full_parameters(
        self, model: torch.nn.Module, *, writeback: bool = False
    ) -> Iterator[torch.nn.Module]:
        """Gather all parameters of a model; with `writeback`, keep what every process alike has changed."""
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.unshard()
        changed: dict[str, torch.Tensor] = {}
        spread_out = gather_spread(model)
        try:
            yield model
            if writeback:
                changed = {name: value.detach().clone() for name, value in model.named_parameters()}
        finally:
            for module, name, parameter in spread_out:
                module._parameters[name] = parameter
            for part in parts:
                part.reshard()
        if changed:
            states.copy_whole(model, changed)

    def context_parallel(
        self,
        context: RunContext,
        buffers: Sequence[torch.Tensor],
        buffer_seq_dims: Sequence[int],
        no_restore_buffers: Collection[torch.Tensor],
    ) -> AbstractContextManager[Any]:
        """Return a context in which this process has its part of sequences, and attention sees all of them."""
        mesh = self.device_mesh(context)
        assert self.parallelism is not None
        assert mesh is not None
        return spread_sequences(self.parallelism, mesh, buffers, buffer_seq_dims, no_restore_buffers)

    # --- states ------------------------------------------------------------------------------------------

    def discard_gradients(self, models: Sequence[torch.nn.Module]) -> None:
        """Forget whole gradients that wait under `no_sync` to be exchanged."""
        parts = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
        for group in (group for part in parts for group in _groups(part)):
            group._partial_reduce_output = None
            for held in group.fsdp_params:
                held.unsharded_accumulated_grad = None
                if hasattr(held, "_unsharded_param"):
                    held._unsharded_param.grad = None

    def model_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the whole state on rank 0, in host memory; nothing on other processes."""
        host, main_only = offloads(self.config.state_dict_config, default=True)
        return states.whole_model_state(model, host=host, main_only=main_only)

    def load_model_state_dict(self, model: torch.nn.Module, state: dict[str, Any]) -> Any:
        """Load a whole state, of which each process keeps its part."""
        return states.load_whole_model_state(model, state)

    def optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Return the whole state on rank 0, in host memory; on other processes only its settings."""
        host, main_only = offloads(self.config.optim_state_dict_config, default=True)
        return states.whole_optimizer_state(optimizer, host=host, main_only=main_only)

    def load_optimizer_state_dict(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Load a whole state, of which each process keeps its part."""
        states.load_whole_optimizer_state(optimizer, state)

    def save_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Write this process's part of each state."""
        states.save_shards(models, optimizers, folder)

    def load_shards(
        self,
        models: Mapping[int, torch.nn.Module],
        optimizers: Mapping[int, torch.optim.Optimizer],
        folder: Path,
    ) -> None:
        """Read what this process holds, whoever has saved it."""
        states.load_shards(models, optimizers, folder)


@contextmanager
def no_sync(model: torch.nn.Module) -> Iterator[None]:
    """Keep a model's gradients on this process: whole, until the first backward that exchanges them."""
    model = inside(model)
    if not isinstance(model, FSDPModule):
        yield
        return
    _set_sync(model, False)
    try:
        yield
    finally:
        _set_sync(model, True)


_LOCAL = "_torchport_gradients_stay"


def _groups(part: FSDPModule) -> list[Any]:
    """Return the groups of parameters of a unit; older versions of PyTorch have at most one."""
    state: Any = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _syncs(model: torch.nn.Module) -> bool:
    return not model.__dict__.get(_LOCAL, False)


def _set_sync(model: FSDPModule, value: bool) -> None:
    model.__dict__[_LOCAL] = not value
    model.set_requires_gradient_sync(value)


def _prefetch(modules: list[Any], forward: bool, backward: BackwardPrefetch | None) -> None:
    """Say which unit's parameters are gathered while another computes."""
    inner = modules[:-1]
    if forward:
        for module, following in itertools.pairwise(inner):
            module.set_modules_to_forward_prefetch([following])
    if backward is BackwardPrefetch.NO_PREFETCH:
        for module in modules:
            module.set_modules_to_backward_prefetch([])
