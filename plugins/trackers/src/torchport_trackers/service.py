"""What the trackers of all services have in common."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torchport.errors import UnavailableError
from torchport.plugin import as_table, plain
from torchport.tracking import GeneralTracker, on_main_process


class ServiceTracker(GeneralTracker):
    """A tracker that hands everything to a service's own run.

    On other processes than the main one nothing is opened: `tracker` is `None`, and all methods do nothing. Methods and
    attributes that this class does not have are those of the run.

    Attributes:
        run_name: The name that it was opened with.
    """

    run_name: str = ""
    _run: Any = None

    @property
    def tracker(self) -> Any:
        """The service's own run; `None` on other processes than the main one, and once it is closed."""
        return self._run

    def __getattr__(self, name: str) -> Any:
        """Return what the service's run has under this name."""
        if name.startswith("_") or self._run is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._run, name)


class ProjectTracker(ServiceTracker):
    """A tracker of a service whose `init(project=...)` opens a run that has `log` and `finish`.

    Args:
        run_name: Name of the project.
        **kwargs: As for the service's `init`.
    """

    @on_main_process
    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._service = service(self.name, self.name)
        self._run = self._service.init(**{"project": run_name, **kwargs})

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table; `kwargs` are those of the service's own table."""
        names, rows = as_table(columns, data, dataframe)
        self._run.log({table_name: self._table(names, rows, **kwargs)}, step=step)

    def _table(self, names: Sequence[str], rows: Sequence[Sequence[Any]], **kwargs: Any) -> Any:
        return self._service.Table(columns=names, data=rows, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()


def service(module: str, extra: str) -> Any:
    """Import a module of a service's package.

    Raises:
        UnavailableError: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UnavailableError(
            f"the tracker {extra!r} needs the package {module.partition('.')[0]}",
            found="it is not installed",
            hint=f"pip install 'torchport-trackers[{extra}]'",
        ) from error


def numbers_and_texts(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Tell numbers from the rest, in a flat mapping; tensors of one element are numbers, booleans 0 and 1."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in values.items():
        value = plain(value)
        if isinstance(value, (bool, int, float)):
            numbers[name] = int(value) if isinstance(value, bool) else value
        else:
            texts[name] = str(value)
    return numbers, texts


def scalar(value: Any) -> Any:
    """Return a value as a number, a text or a truth value, which every service takes; anything else as text."""
    value = plain(value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)
