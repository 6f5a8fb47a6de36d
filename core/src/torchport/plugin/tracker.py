"""The interface to a place where metrics go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torchport.plugin.specs import TrackerSpec


class Tracker(ABC):
    """A place where metrics go. Built on the main process only.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
        run_name: Name of the experiment.
        logging_dir: Folder for trackers that write files; empty where none was given.
    """

    def __init__(
        self, spec: TrackerSpec, config: Any = None, *, run_name: str = "", logging_dir: str = ""
    ) -> None:
        self.spec = spec
        self.config = config
        self.run_name = run_name
        self.logging_dir = logging_dir

    @abstractmethod
    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers and short texts, all belonging to `step`."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still in memory and end the run."""

    @property
    def tracker(self) -> Any:
        """The vendor's own run object."""
        return self

    def store_config(self, values: Mapping[str, Any]) -> None:
        """Record the hyper-parameters of the run."""
        self.log({f"config/{key}": value for key, value in values.items()})

    def log_images(self, images: Mapping[str, Any], step: int | None = None) -> None:
        """Record images: arrays of shape `(n, height, width, channels)` by name."""
        self._unsupported("images")

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        """Record a table."""
        self._unsupported("tables")

    def _unsupported(self, what: str) -> None:
        from torchport.errors import UnsupportedOperationError

        raise UnsupportedOperationError(f"tracker {self.spec.name!r} does not take {what}")
