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
    device. Before a batch is given out, the stream that will compute on it is made to wait for the copy. What memory
    cannot be page-locked, such as that of sparse tensors and of those on a device already, is moved only then.

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
            batch, copies = ready
            self.backend.join_stream(self.stream, [copy for _, copy in copies], self.device)
            ready = self._copy(next(batches, _NONE))
            yield send_to_device(batch, self.device)  # what could not be copied ahead, or hides its tensors
            del batch, copies

    def _copy(self, batch: Any) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Queue the copy of a batch; return it, and each copied tensor behind its source, which must stay so long."""
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if batch is _NONE:
            return _NONE, copies

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            source = self.backend.pin(tensor)
            copies.append((source, source.to(self.device, non_blocking=True)))
            return copies[-1][1]

        with self.backend.use_stream(self.stream):
            return recursively_apply(copy, batch, test_type=_can_be_pinned), copies


def _can_be_pinned(value: Any) -> bool:
    """Whether this is a dense tensor in host memory."""
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return dense and value.device.type == "cpu"
