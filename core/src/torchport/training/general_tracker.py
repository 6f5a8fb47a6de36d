"""Trackers that users write: the documented base class, and what goes with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torchport.errors import ConfigurationError
from torchport.plan import registered
from torchport.plugin.specs import TrackerSpec
from torchport.plugin.tracker import Tracker
from torchport.rank import current_topology

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=type)


def on_main_process(function: F) -> F:
    """Decorate a method of a tracker to run on the main process only; elsewhere it returns `None`.

    A tracker whose `main_process_only` is false runs it on every process.
    """

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", True) and current_topology().rank != 0:
            return None
        return function(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class GeneralTracker(Tracker):
    """The base class of trackers that users write.

    A subclass sets `name` and `requires_logging_directory`, defines `log`, and opens its run in its constructor,
    `__init__(self, run_name, **kwargs)`, or `__init__(self, run_name, logging_dir, **kwargs)` if it requires a
    folder. The keyword arguments are the user's `init_kwargs`.

    Attributes:
        name: The name by which `log_with`, `init_kwargs` and `get_tracker` know it.
        requires_logging_directory: Whether it must be given a folder.
        main_process_only: Whether it is used on the main process only.
    """

    name: str = ""
    requires_logging_directory: bool = False
    main_process_only: bool = True

    def __init__(self, _blank: bool = False) -> None:
        """Open nothing; subclasses need not call it."""

    @classmethod
    def build(
        cls, spec: TrackerSpec, config: Any = None, *, run_name: str, logging_dir: str, **options: Any
    ) -> Tracker:
        """Call the class as its users do: with the name of the run, and a folder if it requires one."""
        make: Any = cls
        folder = (logging_dir,) if cls.requires_logging_directory else ()
        made: Tracker = make(run_name, *folder, **options)
        return made

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values; a subclass must say how.

        Args:
            values: Numbers, short texts, or mappings of such, by name.
            step: What they belong to.
            **kwargs: The user's `log_kwargs` for this tracker.
        """
        raise NotImplementedError

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run; by default nothing is."""

    def finish(self) -> None:
        """Write what is still in memory and end the run; by default there is nothing to do."""

    def store_config(self, values: Mapping[str, Any]) -> None:
        """Call `store_init_configuration`."""
        self.store_init_configuration(dict(values))

    def close(self) -> None:
        """Call `finish`."""
        self.finish()


class BlankTracker(GeneralTracker):
    """Stands for a tracker where it is not open: whatever is called does nothing, and `tracker` is `None`."""

    def __init__(self, name: str) -> None:
        super().__init__(_blank=True)
        self.name = name

    @property
    def tracker(self) -> None:
        """There is none."""
        return None

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Do nothing."""

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Do nothing."""

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that does nothing, in the place of a method of the vendor's run."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def check_tracker(tracker: Any) -> str:
    """Check a tracker, or a class of trackers, that a user brings, and return its name.

    Raises:
        ConfigurationError: naming what it lacks.
    """
    kind = tracker if inspect.isclass(tracker) else type(tracker)
    if not issubclass(kind, GeneralTracker):
        raise ConfigurationError(
            f"{kind.__name__} is no tracker",
            found=f"its base classes are {', '.join(base.__name__ for base in kind.__mro__[1:])}",
            hint="from torchport.tracking import GeneralTracker, and inherit from it",
        )
    name = getattr(tracker, "name", "")
    lacking = [] if isinstance(name, str) and name else ["name, a text such as 'mine'"]
    lacking += [] if kind.log is not GeneralTracker.log else ["log(self, values, step=None)"]
    if lacking:
        raise ConfigurationError(
            f"the tracker {kind.__name__} is not complete",
            found=f"it has no {' and no '.join(lacking)}",
            hint="define it in the class",
        )
    return name


def register_tracker(kind: T) -> T:
    """Make a class of trackers known by its `name`, so that `log_with` and `TORCHPORT_TRACKERS` can choose it.

    Use it as a decorator, before the accelerator is made. A class that was registered under the same name is
    replaced; a name that an installed plugin has is an error when it is chosen.

    Raises:
        ConfigurationError: if the class is no complete `GeneralTracker`.
        InvalidSpecError: if its name has other than lower-case letters, digits, `-` and `_`.
    """
    name = check_tracker(kind)
    kind_: Any = kind
    registered.register_tracker_class(
        kind,
        name,
        summary=(inspect.getdoc(kind) or kind.__name__).partition("\n")[0],
        requires_logging_directory=bool(kind_.requires_logging_directory),
        main_process_only=bool(kind_.main_process_only),
    )
    return kind
