"""What processes exchange: the members of `Accelerator` that are about it."""

from __future__ import annotations

from typing import Any

import torch

from torchport.ops import exchange
from torchport.state import GradientState


class ExchangeControl:
    """Gathering, reducing and triggers; needs `gradient_state`, `device` and `batch_readers` from its class."""

    gradient_state: GradientState
    _triggered: bool

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        raise NotImplementedError

    @property
    def batch_readers(self) -> int:
        """Number of processes that work on the same batch."""
        raise NotImplementedError

    def gather(self, tensor: Any) -> Any:
        """Concatenate tensors of all processes along the first dimension; see `torchport.utils.gather`."""
        return exchange.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather results of a batch, without those of samples that only filled up the last round.

        Of processes that work on the same batch (`tp`, `cp`, `sp`), the results of the first count.

        Args:
            input_data: Tensors (of one shape on all processes), or picklable objects.
            use_gather_object: Whether to gather tensors as objects, in a list.
        """
        return exchange.gather_for_metrics(
            input_data,
            self.gradient_state.real_samples,
            as_objects=use_gather_object,
            readers=self.batch_readers,
        )

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce tensors over all processes; see `torchport.utils.reduce`."""
        return exchange.reduce(tensor, reduction, scale)

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
    ) -> Any:
        """Pad tensors to the largest size over all processes; see `torchport.utils.pad_across_processes`."""
        return exchange.pad_across_processes(tensor, dim, pad_index, pad_first)

    def set_trigger(self) -> None:
        """Raise a flag on this process, which `check_trigger` reports on all."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has called `set_trigger` since the last check; the flag is lowered."""
        mine, self._triggered = torch.tensor(int(self._triggered), device=self.device), False
        return bool(exchange.reduce(mine, "sum") > 0)
