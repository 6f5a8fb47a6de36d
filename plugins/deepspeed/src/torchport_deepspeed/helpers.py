"""Parameters that ZeRO-3 keeps in parts, whole for a while."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def gathered_parameters(
    parameters: Iterable[torch.nn.Parameter], *, writeback: bool = False
) -> AbstractContextManager[Any]:
    """Return a context in which parameters are whole on every process; call it on every process.

    Args:
        parameters: Parameters, of which ZeRO-3 has partitioned some, all or none.
        writeback: Whether what the main process changes is kept, on all of them.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0 if writeback else None
    )
    return context
