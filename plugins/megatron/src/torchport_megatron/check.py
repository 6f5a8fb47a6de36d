"""What a plan must have for Megatron-Core, before anything is built."""

from __future__ import annotations

from typing import Any

from torchport.errors import IncompatibleError

from torchport_megatron.config import MegatronLMPlugin


def check(plan: Any) -> None:
    """Refuse a plan that Megatron-Core cannot carry out.

    Raises:
        IncompatibleError: if the device is not CUDA, or the processes cannot be divided as asked.
    """
    decision = plan["strategy"]
    config = decision.config
    if not isinstance(config, MegatronLMPlugin):
        return
    asked = f"{decision.source} asks for the strategy {decision.name!r}"
    device = plan["backend"].spec.device_type
    if device != "cuda":
        raise IncompatibleError(
            f"{asked} on the backend {plan.backend!r}",
            reason=f"Megatron-Core's attention, optimizers and schedules run on CUDA only, not on {device}",
            hint="--strategy fsdp or deepspeed, which run on any backend, or a machine with CUDA",
        )
    if plan.precision not in ("no", "bf16", "fp16"):
        raise IncompatibleError(
            f"{asked} with the precision {plan.precision!r}",
            reason="Megatron-Core holds parameters in a dtype of its own",
            hint="precision no, bf16 or fp16",
        )
    size, model = plan.topology.world_size, config.tp_degree * config.pp_degree
    if size % model:
        raise IncompatibleError(
            f"{asked} with tp_degree {config.tp_degree} and pp_degree {config.pp_degree}",
            found=f"{size} processes",
            reason=f"the number of processes must be a multiple of {model}",
            hint=f"--num-processes {max(model, size // model * model)}",
        )
