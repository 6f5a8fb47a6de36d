"""Activations that are computed anew in a backward instead of being kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed._composable.checkpoint_activation import checkpoint
from torchport.errors import ConfigurationError

from torchport_fsdp.sequences import recomputing


def recompute(modules: Sequence[torch.nn.Module], model: torch.nn.Module) -> None:
    """Let each of some modules compute its activations anew; their parameters keep their names.

    Raises:
        ConfigurationError: if there is none.
    """
    if not modules:
        raise ConfigurationError(
            "activation_checkpointing needs units whose activations are computed anew",
            found=f"{type(model).__name__} is one unit, whose inputs are all there is before it",
            hint="auto_wrap_policy='TRANSFORMER_BASED_WRAP' with transformer_cls_names_to_wrap=[...]",
        )
    for module in modules:
        checkpoint(module, context_fn=recomputing)
