"""A Megatron-Core model, its optimizer and its schedule, as one module that scripts call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torchport.errors import OperationError

from torchport_megatron.config import MegatronLMPlugin
from torchport_megatron.mapping import (
    Shape,
    data_parallel_config,
    optimizer_config,
    schedule,
    sequence_length,
)
from torchport_megatron.models import make_model
from torchport_megatron.placeholders import MegatronLMDummyScheduler
from torchport_megatron.steps import STEPS


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """What a forward returns.

    Attributes:
        loss: Mean over micro-batches and data-parallel processes, the same on all processes. No dimensions.
        logits: Those of the micro-batches (GPT with `return_logits`, last pipeline stage); `None` elsewhere.
        losses: The parts of the loss, by name.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None = None
    losses: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class MegatronEngine(torch.nn.Module):
    """A model that runs forward and backward of all micro-batches when it is called.

    Args:
        shape: The model.
        plugin: The settings.
        dtype: The dtype of parameters; `None` for float32.
        device: The device of this process.
    """

    def __init__(
        self, shape: Shape, plugin: MegatronLMPlugin, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        super().__init__()
        self.shape, self.plugin, self.dtype, self.device = shape, plugin, dtype, device
        model = make_model(
            shape,
            plugin,
            dtype,
            first=parallel_state.is_pipeline_first_stage(),
            last=parallel_state.is_pipeline_last_stage(),
        ).to(device)
        if dtype is not None:
            from megatron.core.transformer.module import Float16Module

            model = Float16Module(model.config, model)
        self.module = DistributedDataParallel(model.config, data_parallel_config(plugin, dtype), model)
        self.module.broadcast_params()
        step = plugin.custom_train_step_class or STEPS[shape.kind]
        further = dict(plugin.custom_train_step_kwargs or {})
        if shape.kind == "t5":
            further.setdefault("start_token", shape.start_token)
        self.train_step = step(plugin, device=device, **further)
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.grad_norm = torch.zeros((), device=device)

    def attach(self, optimizer: torch.optim.Optimizer, scheduler: MegatronLMDummyScheduler | None) -> None:
        """Make Megatron-Core's optimizer and scheduler; the script's show their learning rates from now on."""
        config = optimizer_config(optimizer, self.plugin, self.dtype)
        self.optimizer = get_megatron_optimizer(config, [self.module])
        total = scheduler.total_num_steps if scheduler is not None else None
        warmup = scheduler.warmup_num_steps if scheduler is not None else 0
        self._scheduling = config, total, warmup
        optimizer.param_groups[:] = self.optimizer.param_groups
        optimizer.state.clear()
        model_config = self.module.config
        model_config.grad_scale_func = self.optimizer.scale_loss
        model_config.no_sync_func = self.module.no_sync
        model_config.finalize_model_grads_func = finalize_model_grads
        self._placeholder = scheduler

    def forward(self, **batch: torch.Tensor) -> Output:
        """Run the micro-batches of a batch; in training, backward too.

        Args:
            **batch: Tensors whose first dimension is divided by `num_micro_batches`.
        """
        count = self.plugin.num_micro_batches
        size = len(next(iter(batch.values())))
        if size % count:
            raise OperationError(
                f"a batch of {size} samples in {count} micro-batches",
                reason="they must be of one size",
                hint=f"DataLoader(batch_size={max(count, size // count * count)}, drop_last=True)",
            )
        training = self.training and torch.is_grad_enabled() and self.optimizer is not None
        if training:
            self._schedule(size)
            self.module.zero_grad_buffer()
            self.optimizer.zero_grad()
        parts: Iterator[dict[str, torch.Tensor]] = iter(
            [
                {name: value[i * size // count : (i + 1) * size // count] for name, value in batch.items()}
                for i in range(count)
            ]
        )
        reports = get_forward_backward_func()(
            forward_step_func=self.train_step.forward_step,
            data_iterator=parts,
            model=[self.module],
            num_microbatches=count,
            seq_length=sequence_length(self.shape, self.plugin),
            micro_batch_size=size // count,
            decoder_seq_length=self.plugin.decoder_seq_length,
            forward_only=not training,
        )
        return self._output(reports)

    def step(self) -> bool:
        """Step the optimizer, which clips, and then the scheduler; return whether a step was taken."""
        successful, norm, _ = self.optimizer.step()
        if norm is not None:
            self.grad_norm = torch.as_tensor(norm, device=self.device)
        if successful and self.scheduler is not None:
            self.scheduler.step(increment=self.plugin.global_batch_size)
        return bool(successful)

    def _schedule(self, size: int) -> None:
        """Make the scheduler at the first batch, as it counts samples."""
        if self.scheduler is not None:
            return
        self.plugin.global_batch_size = size * parallel_state.get_data_parallel_world_size()
        arguments = schedule(self.plugin, *self._scheduling, self.plugin.global_batch_size)
        self.scheduler = OptimizerParamScheduler(self.optimizer, **arguments)
        if self.plugin.consumed_samples:
            self.scheduler.step(increment=self.plugin.consumed_samples[0])
        if self._placeholder is not None:
            self._placeholder.scheduler = self.scheduler

    def _output(self, reports: list[dict[str, Any]]) -> Output:
        """Average what the last pipeline stage reported, and tell the other stages."""
        names = [name for name in (reports[0] if reports else {}) if name != "logits"]
        shared: list[Any] = [names]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        if self.plugin.pp_degree > 1:
            torch.distributed.broadcast_object_list(shared, src=last, group=group, device=self.device)
        (names,) = shared
        means = (
            torch.stack([torch.stack([torch.as_tensor(r[name]) for r in reports]).mean() for name in names])
            if reports
            else torch.zeros(len(names), device=self.device)
        )
        if self.plugin.pp_degree > 1:
            torch.distributed.broadcast(means, src=last, group=group)
        logits = [report["logits"] for report in reports if "logits" in report]
        return Output(
            means.sum(), torch.cat(logits) if logits else None, dict(zip(names, means, strict=True))
        )
