"""Copy the next batch to the device while the current one is computed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchport.ops.pytree import recursively_apply, send_to_device
from torchport.plugin.backend import Backend

ReadAhead = Callable[[Iterator[Any]], Iterator[Any]]
"""What yields the batches of a pass on the device, reading and moving them ahead."""

_NONE: Any = object()


class Prefetch:
    """Gives batches on the device, one of them always on its way there on a stream of its own.

    The host memory of a batch is page-locked first, so that its copy runs beside the work that is queued on the
    device. Before a batch is given out, the stream that will compute on it is made to wait for the copy.

    Args:
        backend: The backend, whose device has streams.
        device: Where to.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend = backend
        self.device = device
        self.stream = backend.stream(device)

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches on the device."""
        ready = self._copy(next(batches, _NONE))
        while ready[0] is not _NONE:
            batch, source = ready
            tensors: list[torch.Tensor] = []
            recursively_apply(tensors.append, batch)
            self.backend.join_stream(self.stream, tensors, self.device)
            ready = self._copy(next(batches, _NONE))
            yield send_to_device(batch, self.device)  # what hides its tensors has not been copied yet
            del batch, source, tensors

    def _copy(self, batch: Any) -> tuple[Any, Any]:
        """Queue the copy of a batch; return it, and the host memory that must stay until it is done."""
        if batch is _NONE:
            return _NONE, None
        source = recursively_apply(self.backend.pin, batch)
        with self.backend.use_stream(self.stream):
            copied = recursively_apply(torch.Tensor.to, source, self.device, non_blocking=True)
        return copied, source
