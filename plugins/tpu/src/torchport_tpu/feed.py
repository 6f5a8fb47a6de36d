"""Batches on their way to the device, read and moved ahead by the threads of torch_xla's parallel loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch_xla.distributed.parallel_loader as pl
from torchport.ops.pytree import recursively_apply, send_to_device

READ_AHEAD = 4
"""Batches that may wait on the host."""

ON_DEVICE = 2
"""Batches that may wait on the device; as many are moved at a time."""


def feed(batches: Iterator[Any], device: torch.device, sharding: Any) -> Iterator[Any]:
    """Yield batches on the device; before each, the step recorded so far is run.

    The loader that gives them out counts them then, so that what is read ahead changes neither accumulation windows
    nor the place that a checkpoint remembers.

    Args:
        batches: Those of a pass, on the host.
        device: Where to.
        sharding: How tensors are spread over devices, for `xm.send_cpu_data_to_device`; `None` for one device.

    Raises:
        Exception: what ended the batches, which are read in another thread.
    """
    read: deque[Any] = deque()
    errors: list[Exception] = []

    def tensors() -> Iterator[list[torch.Tensor]]:
        """Give torch_xla the tensors alone: of the containers around them it would make lists."""
        try:
            for batch in batches:
                found: list[torch.Tensor] = []
                recursively_apply(found.append, batch)
                read.append(batch)
                yield found
        except Exception as error:
            errors.append(error)

    loader = pl.ParallelLoader(
        tensors(),
        [device],
        loader_prefetch_size=READ_AHEAD,
        device_prefetch_size=ON_DEVICE,
        input_sharding=sharding,
    )
    try:
        for found in loader.per_device_loader(device):
            moved = iter(found)
            placed = recursively_apply(lambda _, moved=moved: next(moved), read.popleft())
            yield send_to_device(placed, device)  # what hides its tensors has not been moved yet
    finally:
        loader.close()
    if errors:
        raise errors[0]
