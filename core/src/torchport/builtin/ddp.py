"""Data parallelism: a replica of the model in each process, gradients averaged during backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from torchport.builtin.ddp_config import DDPCommunicationHookType, DistributedDataParallelKwargs
from torchport.plugin.binding import bind_step
from torchport.plugin.strategy import Prepared, PrepareRequest, Strategy


class DdpStrategy(Strategy):
    """`torch.nn.parallel.DistributedDataParallel` over any backend whose collectives open a process group."""

    config: DistributedDataParallelKwargs
    supports_local_steps = True

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Replicate models, and bind them to the precision."""
        models = [
            self._replicate(model, place, request)
            for model, place in zip(request.models, request.device_placement, strict=True)
        ]
        return bind_step(request, models, no_sync=_no_sync)

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the module inside the replica."""
        if isinstance(model, DistributedDataParallel):
            inner: torch.nn.Module = model.module
            return inner
        return model

    def join(
        self, models: Iterable[torch.nn.Module], *, even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        """Let processes that have run out of batches answer for the others (`torch.distributed.algorithms.join`)."""
        replicas: list[Any] = [model for model in models if isinstance(model, DistributedDataParallel)]
        return Join(replicas) if replicas else nullcontext()

    @contextmanager
    def trigger_sync_in_backward(self, model: torch.nn.Module) -> Iterator[None]:
        """Let the next backward exchange gradients, though its forwards ran under `no_sync`."""
        if not isinstance(model, DistributedDataParallel):
            yield
            return
        before = model.require_backward_grad_sync
        model.require_backward_grad_sync = True
        model.reducer.prepare_for_backward([])
        try:
            yield
        finally:
            model.require_backward_grad_sync = before

    def _replicate(self, model: torch.nn.Module, place: bool, request: PrepareRequest) -> torch.nn.Module:
        context = request.context
        if place:
            model = model.to(context.device)
        if isinstance(model, DistributedDataParallel):
            context.precision.apply(model.module, context)
            return model
        model = context.precision.apply(model, context)
        if request.evaluation_only or not any(p.requires_grad for p in model.parameters()):
            return model  # nothing to average
        index = context.device.index
        replica = DistributedDataParallel(
            model,
            device_ids=None if index is None or not place else [index],
            **self._arguments(),
        )
        self._compress(replica)
        return replica

    def _arguments(self) -> dict[str, Any]:
        ours = {"comm_hook", "comm_wrapper", "comm_state_option", "check_reduction"}
        return {name: value for name, value in self.config.to_kwargs().items() if name not in ours}

    def _compress(self, replica: DistributedDataParallel) -> None:
        """Register the communication hook, wrapped in a cast where one is asked for."""
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        kind = DDPCommunicationHookType
        hooks: dict[DDPCommunicationHookType, Callable[..., Any]] = {
            kind.FP16: default_hooks.fp16_compress_hook,
            kind.BF16: default_hooks.bf16_compress_hook,
            kind.POWER_SGD: powerSGD_hook.powerSGD_hook,
            kind.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
        }
        wrappers = {
            kind.FP16: default_hooks.fp16_compress_wrapper,
            kind.BF16: default_hooks.bf16_compress_wrapper,
        }
        if self.config.comm_hook == kind.NO and self.config.comm_wrapper == kind.NO:
            return
        hook = hooks.get(self.config.comm_hook, default_hooks.allreduce_hook)
        if self.config.comm_wrapper != kind.NO:
            hook = wrappers[self.config.comm_wrapper](hook)
        state = None
        if self.config.comm_hook in (kind.POWER_SGD, kind.BATCHED_POWER_SGD):
            state = powerSGD_hook.PowerSGDState(process_group=None, **self.config.comm_state_option)
        replica.register_comm_hook(state=state, hook=_anonymous(hook))


def _anonymous(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Hide the name of a hook, by which PyTorch refuses bfloat16 outside a list of collectives.

    What counts is whether the chosen collectives carry the dtype; they say so at the first backward.
    """

    def compress(state: Any, bucket: Any) -> Any:
        return hook(state, bucket)

    compress.__annotations__.clear()  # PyTorch compares annotations, and these are texts
    return compress


def _no_sync(model: torch.nn.Module) -> AbstractContextManager[Any]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
