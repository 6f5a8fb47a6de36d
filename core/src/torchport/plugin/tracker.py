"""The interface to a place where metrics go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torchport.errors import UnsupportedOperationError
from torchport.plugin.specs import TrackerSpec


class Tracker(ABC):
    """A place where metrics go. Built on the main process, unless its descriptor says otherwise.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
        run_name: Name of the experiment.
        logging_dir: Folder for trackers that write files; empty where none was given.
    """

    spec: TrackerSpec
    name: str

    def __init__(
        self, spec: TrackerSpec, config: Any = None, *, run_name: str = "", logging_dir: str = ""
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.config = config
        self.run_name = run_name
        self.logging_dir = logging_dir

    @classmethod
    def build(
        cls, spec: TrackerSpec, config: Any = None, *, run_name: str, logging_dir: str, **options: Any
    ) -> Tracker:
        """Build a tracker of this class for a run; `options` are the user's `init_kwargs` for it."""
        return cls(spec, config, run_name=run_name, logging_dir=logging_dir, **options)

    @abstractmethod
    def log(self, metrics: Mapping[str, Any], /, step: int | None = None) -> None:
        """Record numbers and short texts, all belonging to `step`. May take further arguments by name."""

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

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images by name: arrays `(n, height, width, channels)`, or lists of `(height, width[, channels])`."""
        self._unsupported("images")

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table: names of columns and rows, or a data frame."""
        self._unsupported("tables")

    def _unsupported(self, what: str) -> None:
        name = getattr(self, "name", type(self).__name__)
        raise UnsupportedOperationError(f"tracker {name!r} does not take {what}")
