"""Megatron-Core: descriptors only; imports no torch. Public names are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torchport.plugin import Requirements, StrategySpec, hookimpl, lazy_exports

if TYPE_CHECKING:
    from torchport_megatron.config import MegatronLMPlugin
    from torchport_megatron.placeholders import MegatronLMDummyDataLoader, MegatronLMDummyScheduler
    from torchport_megatron.steps import (
        AbstractTrainStep,
        BertTrainStep,
        GPTTrainStep,
        T5TrainStep,
        avg_losses_across_data_parallel_group,
    )


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer tensor, pipeline and sequence parallelism for three kinds of transformers."""
    yield StrategySpec(
        name="megatron",
        aliases=("megatron_lm", "megatron-lm"),
        factory="torchport_megatron.strategy:MegatronStrategy",
        config="torchport_megatron.config:MegatronLMPlugin",
        summary="tensor, pipeline and sequence parallelism of GPT, BERT and T5 by Megatron-Core (CUDA only)",
        needs=Requirements(distributed=True),
        distributed_type="MEGATRON_LM",
        runtime=("megatron-core>=0.16",),
    )


@hookimpl
def torchport_plan_resolved(plan: Any) -> None:
    """Refuse devices that Megatron-Core has no kernels for, and layouts that do not fit the processes."""
    if plan.strategy == "megatron":
        from torchport_megatron.check import check

        check(plan)


_EXPORTS = {
    "AbstractTrainStep": ".steps",
    "BertTrainStep": ".steps",
    "GPTTrainStep": ".steps",
    "MegatronLMDummyDataLoader": ".placeholders",
    "MegatronLMDummyScheduler": ".placeholders",
    "MegatronLMPlugin": ".config",
    "T5TrainStep": ".steps",
    "avg_losses_across_data_parallel_group": ".steps",
}

__all__ = [
    "AbstractTrainStep",
    "BertTrainStep",
    "GPTTrainStep",
    "MegatronLMDummyDataLoader",
    "MegatronLMDummyScheduler",
    "MegatronLMPlugin",
    "T5TrainStep",
    "avg_losses_across_data_parallel_group",
]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS)
