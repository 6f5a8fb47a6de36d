"""Which process does what: the methods that `PartialState` and `Accelerator` share."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import numpy as np
import torch

from torchport.errors import OperationError
from torchport.ops import exchange
from torchport.ops.pytree import like_mapping
from torchport.plugin.specs import Topology

F = TypeVar("F", bound=Callable[..., Any])


class ProcessControl:
    """Run code on some processes and not on others; needs `topology` from the class that mixes it in."""

    @property
    def topology(self) -> Topology:
        """The place of this process in the job."""
        raise NotImplementedError

    @property
    def num_processes(self) -> int:
        """Number of processes of the job."""
        return self.topology.world_size

    @property
    def process_index(self) -> int:
        """Index of this process among all (its rank)."""
        return self.topology.rank

    @property
    def local_process_index(self) -> int:
        """Index of this process on its machine (its local rank)."""
        return self.topology.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.topology.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is process 0 of its machine."""
        return self.topology.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the process with the highest index."""
        return self.topology.rank == self.topology.world_size - 1

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.topology.world_size > 1

    def wait_for_everyone(self) -> None:
        """Wait until every process has come here."""
        exchange.wait_for_everyone()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process of each machine only."""
        if self.is_local_main_process:
            builtins.print(*args, **kwargs)  # noqa: T201 - what the user asked for

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process run the block before all others."""
        yield from self._first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let the main process of each machine run the block before the others there."""
        yield from self._first(self.is_local_main_process)

    def _first(self, goes_first: bool) -> Iterator[None]:
        if not goes_first:
            self.wait_for_everyone()
        try:
            yield
        finally:
            if goes_first:
                self.wait_for_everyone()

    @overload
    def on_main_process(self, function: F) -> F: ...
    @overload
    def on_main_process(self, function: None = None) -> Callable[[F], F]: ...
    def on_main_process(self, function: Any = None) -> Any:
        """Decorate a function to run on the main process only; elsewhere it returns `None`."""
        return self._only(lambda: self.is_main_process, function)

    @overload
    def on_local_main_process(self, function: F) -> F: ...
    @overload
    def on_local_main_process(self, function: None = None) -> Callable[[F], F]: ...
    def on_local_main_process(self, function: Any = None) -> Any:
        """Decorate a function to run on the main process of each machine only."""
        return self._only(lambda: self.is_local_main_process, function)

    @overload
    def on_last_process(self, function: F) -> F: ...
    @overload
    def on_last_process(self, function: None = None) -> Callable[[F], F]: ...
    def on_last_process(self, function: Any = None) -> Any:
        """Decorate a function to run on the last process only."""
        return self._only(lambda: self.is_last_process, function)

    def on_process(self, function: Any = None, process_index: int = 0) -> Any:
        """Decorate a function to run on the process of this index only."""
        return self._only(lambda: self.process_index == process_index, function)

    def on_local_process(self, function: Any = None, local_process_index: int = 0, **aliases: int) -> Any:
        """Decorate a function to run on the process of this local index on each machine only."""
        index = aliases.pop("local_process_idx", local_process_index)
        if aliases:
            raise TypeError(f"on_local_process takes no argument {next(iter(aliases))!r}")
        return self._only(lambda: self.local_process_index == index, function)

    @staticmethod
    def _only(condition: Callable[[], bool], function: Any) -> Any:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def run(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs) if condition() else None

            return run

        return decorate if function is None else decorate(function)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give this process its share of the inputs.

        The first processes get one item more where the number does not divide.

        Args:
            inputs: A list, tuple, tensor (split along its first dimension), or a mapping of such, all of one
                length.
            apply_padding: Whether to repeat the last item so that all processes get as many. Cut the
                surplus off after gathering.

        Raises:
            OperationError: if the values of a mapping have different lengths.
        """
        yield self._share(inputs, apply_padding)

    def _share(self, inputs: Any, pad: bool) -> Any:
        if self.num_processes == 1:
            return inputs
        if isinstance(inputs, Mapping):
            lengths = {key: len(value) for key, value in inputs.items()}
            if len(set(lengths.values())) > 1:
                raise OperationError(
                    "split_between_processes needs values of one length",
                    found=", ".join(f"{key}: {length}" for key, length in lengths.items()),
                )
            return like_mapping(inputs, {key: self._share(value, pad) for key, value in inputs.items()})
        length = len(inputs)
        base, extra = divmod(length, self.num_processes)
        start = self.process_index * base + min(self.process_index, extra)
        end = start + base + (self.process_index < extra)
        share = inputs[start:end]
        missing = base + (extra > 0) - (end - start)
        if not pad or missing == 0 or length == 0:
            return share
        last = inputs[length - 1 : length]
        if isinstance(inputs, torch.Tensor):
            return torch.cat([share, last.expand(missing, *last.shape[1:])])
        if isinstance(inputs, np.ndarray):
            return np.concatenate([share, np.repeat(last, missing, axis=0)])
        if not isinstance(inputs, (list, tuple)):
            raise OperationError(
                f"split_between_processes cannot pad a {type(inputs).__name__}",
                hint="a list, a tuple, a tensor or an array, or apply_padding=False",
            )
        return share + last * missing
