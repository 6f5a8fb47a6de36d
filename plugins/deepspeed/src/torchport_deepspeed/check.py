"""What DeepSpeed cannot do on the backend of a plan, before anything is started. Imports no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchport.errors import IncompatibleError


def check(plan: Any) -> Iterable[str]:
    """Return what the operator should hear about a plan with the strategy `deepspeed`: nothing.

    Args:
        plan: The plan.

    Raises:
        IncompatibleError: for fp16 on a processor that has no instructions for it.
    """
    precision = plan["precision"]
    if precision.name == "fp16" and plan["backend"].spec.device_type == "cpu" and not processor_has_fp16():
        raise IncompatibleError(
            f"{precision.source} asks for the precision 'fp16', with the strategy 'deepspeed'",
            found=f"the backend is {plan.backend!r}",
            reason="DeepSpeed has no fp16 on this processor, which lacks instructions for it (AVX512-FP16)",
            hint='precision bf16, or another strategy; in a configuration file, fp16.enabled: "auto"',
        )
    return ()


def processor_has_fp16() -> bool:
    """Whether DeepSpeed takes fp16 on this processor: it asks oneDNN, as this does."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False
