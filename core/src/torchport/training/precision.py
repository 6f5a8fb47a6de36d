"""Contexts and loss scalers of the run's precision, for loops that are written by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torchport.config.kwargs import AutocastKwargs
from torchport.errors import ConfigurationError
from torchport.runtime import Runtime


def get_grad_scaler(distributed_type: Any = None, **kwargs: Any) -> torch.amp.GradScaler:
    """Return a loss scaler that works on the device of the run.

    Args:
        distributed_type: Accepted for compatibility: the run's backend knows its own scaler.
        **kwargs: Arguments of `torch.amp.GradScaler`.
    """
    if Runtime.current is not None:
        return Runtime.current.backend.grad_scaler(**kwargs)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.amp.GradScaler("cpu" if device is None else device.type, **kwargs)


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """Return a context in which operations run in the run's precision.

    Args:
        native_amp: Whether to change anything; if not, the context does nothing.
        autocast_kwargs: How `torch.autocast` behaves in it.

    Raises:
        ConfigurationError: if no run is open, so that the precision is not known.
    """
    if not native_amp:
        return nullcontext()
    runtime = Runtime.current
    if runtime is None:
        raise ConfigurationError("the precision of the run is not known yet", hint="Accelerator() before it")
    precision = runtime.precision()
    options = AutocastKwargs() if autocast_kwargs is None else autocast_kwargs
    return precision.forward_context(runtime.context(precision, 1, ()), options)()
