"""Hand metrics to the trackers of the plan, and to those that the user brings."""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torchport import envvars
from torchport.errors import ConfigurationError, TorchportError, TrackerError, UnsupportedOperationError
from torchport.plan.decision import Decision
from torchport.plan.registry import load_reference
from torchport.plugin.specs import TrackerSpec
from torchport.plugin.tracker import Tracker
from torchport.training.general_tracker import BlankTracker, GeneralTracker, check_tracker

MOST_FAILURES = 10
"""After so many failures one after the other, a tracker is not called any more."""


def separate(trackers: Any) -> tuple[list[str] | None, tuple[Any, ...]]:
    """Tell names from trackers that the user brings, which no plan can choose.

    Args:
        trackers: A name (or several, separated by commas), a tracker, a class of trackers, or a list of such.

    Returns:
        The names, which are left to the plan (`None` if nothing at all is asked for), and the rest.

    Raises:
        ConfigurationError: if something is neither.
    """
    if trackers is None:
        return None, ()
    several = isinstance(trackers, Iterable) and not isinstance(trackers, (str, Mapping, type, Tracker))
    items = list(trackers) if several else [trackers]
    names: list[str] = []
    given: list[Any] = []
    for item in items:
        if isinstance(item, str):
            names += [part.strip() for part in str.__str__(item).split(",") if part.strip()]
        elif isinstance(item, GeneralTracker) or (inspect.isclass(item) and issubclass(item, GeneralTracker)):
            check_tracker(item)
            given.append(item)
        elif item is not None:
            raise ConfigurationError(
                f"log_with={item!r} is neither the name of a tracker nor a tracker",
                found=f"an object of the type {type(item).__name__}",
                hint="a name ('jsonl'; torchport plugins --kind tracker lists them), 'all',"
                " a torchport.tracking.GeneralTracker, or a list of such",
            )
    repeated = {name for name in (*names, *(item.name for item in given)) if name != "all"}
    if len(repeated) < len([*(n for n in names if n != "all"), *given]):
        raise ConfigurationError(
            "log_with has two trackers of one name",
            found=", ".join([*names, *(f"{item.name} (brought by the script)" for item in given)]),
            hint="give each a name of its own",
        )
    return names, tuple(given)


class Tracking:
    """The trackers of a run. A process has those that are for it: most are for the main one alone.

    A tracker that fails does not stop the training, unless that is asked for: its first failure is reported, and
    after `MOST_FAILURES` one after the other it is not called any more.

    Args:
        decision: The slot `trackers` of the plan.
        given: Trackers, and classes of trackers, that the user brings.
        active: Whether this is the main process.
        logging_dir: Folder for trackers that write files.

    Raises:
        ConfigurationError: if a tracker that was asked for by name needs a folder, and there is none.
    """

    def __init__(
        self, decision: Decision, *, given: tuple[Any, ...] = (), active: bool, logging_dir: str | None
    ) -> None:
        self.decision = decision
        self.active = active
        self.logging_dir = logging_dir or ""
        self.trackers: dict[str, Tracker] = {}
        self.strict: bool | None = None
        self._given = given
        self._opened = False
        self._failures: dict[str, int] = {}
        self._reported: set[object] = set()
        self._process = os.getpid()
        self.names = tuple(dict.fromkeys([*decision.choice, *(item.name for item in given)]))
        self._sources: list[tuple[str, Any]] = [
            *((spec.name, spec) for spec in decision.specs if spec.name not in {item.name for item in given}),
            *((item.name, item) for item in given),
        ]
        for name, source in self._sources:
            if self._lacks_folder(source) and not self._unasked(name):
                raise ConfigurationError(
                    f"the tracker {name!r} writes files and needs a folder",
                    found="neither project_dir nor logging_dir is set",
                    hint="Accelerator(project_dir='runs'), or ProjectConfiguration(logging_dir=...)",
                )

    # --- opening and closing -----------------------------------------------------------------------------

    def open(
        self,
        run_name: str,
        config: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        strict: bool | None = None,
    ) -> None:
        """Build the trackers and record the hyper-parameters; those of an earlier call are closed.

        Args:
            run_name: Name of the experiment.
            config: Hyper-parameters by name.
            options: By name of a tracker, further arguments of its construction.
            strict: Whether a tracker that fails stops the training; `None` asks the variable.

        Raises:
            ConfigurationError: if `options` names a tracker that the run does not have, or arguments that one does not
                take.
            TrackerError: if a tracker cannot be opened, and `strict` is set.
        """
        self._check_names("init_trackers", "init_kwargs", options)
        self.strict = envvars.flag(os.environ, envvars.TRACKERS_STRICT) if strict is None else strict
        self.close()
        self._opened = True
        atexit.register(self._close_at_exit)
        for name, source in self._sources:
            if not (self.active or not source.main_process_only):
                continue
            tracker = self._build(name, source, run_name, options.get(name, {}))
            if tracker is not None:
                self.trackers[name] = tracker
                if config is not None:
                    self._try(name, "the configuration", functools.partial(tracker.store_config, config))

    def _build(self, name: str, source: Any, run_name: str, options: Mapping[str, Any]) -> Tracker | None:
        """Build one tracker; what fails in the service is reported, and what the user got wrong is raised."""
        if isinstance(source, Tracker):
            if options:
                raise ConfigurationError(
                    f"init_kwargs has arguments for {name!r}", found="a tracker that is built already"
                )
            return source
        if self._lacks_folder(source):
            self._report(
                name, "opening", "it needs a folder, and neither project_dir nor logging_dir is set", ""
            )
            return None
        try:
            kind = load_reference(source.factory) if isinstance(source, TrackerSpec) else source
            build = getattr(kind, "build", kind)
            built: Tracker = build(source, None, run_name=run_name, logging_dir=self.logging_dir, **options)
            return built
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if options and isinstance(error, TypeError):
                raise ConfigurationError(
                    f"the tracker {name!r} could not be opened with init_kwargs[{name!r}]",
                    found=", ".join(options),
                    reason=reason,
                ) from error
            if self.strict or isinstance(error, TorchportError):
                raise TrackerError(
                    f"tracker {name!r} ({self.decision.source}) could not be opened",
                    reason=reason,
                    hint=f"leave it out, or without {envvars.TRACKERS_STRICT}=1 train without it",
                ) from error
            self._report(name, "opening", reason, "; it records nothing")
            return None

    def close(self) -> None:
        """End every tracker's run."""
        atexit.unregister(self._close_at_exit)
        trackers, self.trackers = dict(self.trackers), {}
        for name, tracker in trackers.items():
            self._try(name, "closing", tracker.close)
        self._opened = False
        self._failures.clear()
        self._reported.clear()

    def _close_at_exit(self) -> None:
        """Close what the script left open; not in a process that was forked from it."""
        if os.getpid() == self._process:
            self.strict = False
            self.close()

    # --- recording ---------------------------------------------------------------------------------------

    def log(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand metrics to every tracker, with the further arguments that `options` has for it."""
        self._each("log", "metrics", options, metrics, step)

    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand images to every tracker."""
        self._each("log_images", "images", options, values, step)

    def log_table(
        self,
        name: str,
        columns: Any,
        data: Any,
        dataframe: Any,
        step: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand a table to every tracker."""
        self._each("log_table", "a table", options, name, columns, data, dataframe, step)

    def _each(
        self, method: str, what: str, options: Mapping[str, Mapping[str, Any]] | None, *args: Any
    ) -> None:
        if options:
            self._check_names(method, "log_kwargs", options)
        if not self._opened and self.names and self.active and "unopened" not in self._reported:
            self._reported.add("unopened")
            _say(f"{method}() before init_trackers(): nothing is recorded by {', '.join(self.names)}")
        for name, tracker in tuple(self.trackers.items()):
            further = options.get(name, {}) if options else {}
            self._try(name, what, functools.partial(getattr(tracker, method), *args, **further))

    def get(self, name: str) -> Tracker:
        """Return a tracker by name; where it is not open (on other processes, or if it failed), a blank one.

        Raises:
            ConfigurationError: if the run has no such tracker, or it has not been opened.
        """
        if name in self.trackers:
            return self.trackers[name]
        if name in self.names and self._opened:
            return BlankTracker(name)
        raise ConfigurationError(
            f"there is no tracker {name!r}",
            found=f"open trackers: {', '.join(self.trackers) or 'none'}",
            hint="init_trackers('name of the run') first"
            if name in self.names
            else f"TORCHPORT_TRACKERS={name}, or Accelerator(log_with={name!r})",
        )

    # --- failing -----------------------------------------------------------------------------------------

    def _try(self, name: str, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except UnsupportedOperationError as error:
            if (name, what) not in self._reported:
                self._reported.add((name, what))
                _say(f"{error.problem}: it records none")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self.strict:
                raise TrackerError(
                    f"tracker {name!r} failed at {what}",
                    reason=reason,
                    hint=f"{envvars.TRACKERS_STRICT}=0 lets the training go on",
                ) from error
            self._report(name, what, reason, "")
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] == MOST_FAILURES and self.trackers.pop(name, None) is not None:
                _say(f"tracker {name!r} failed {MOST_FAILURES} times in a row and is not called any more")
        else:
            self._failures.pop(name, None)

    def _report(self, name: str, what: str, reason: str, consequence: str) -> None:
        if name not in self._reported:
            self._reported.add(name)
            _say(f"tracker {name!r} failed at {what}, and training goes on{consequence}: {reason}")

    # --- what there is -----------------------------------------------------------------------------------

    def _check_names(self, method: str, argument: str, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(self.names))
        if unknown:
            raise ConfigurationError(
                f"{method} has {argument} for {', '.join(unknown)}",
                found=f"the trackers of this run are: {', '.join(self.names) or 'none'}",
                hint=f"TORCHPORT_TRACKERS={unknown[0]}, or Accelerator(log_with={unknown[0]!r})",
            )

    def _lacks_folder(self, source: Any) -> bool:
        return (
            not self.logging_dir
            and not isinstance(source, Tracker)
            and bool(getattr(source, "requires_logging_directory", False))
        )

    def _unasked(self, name: str) -> bool:
        """Whether a tracker is there only because all were asked for."""
        return name in self.decision.implied


def _say(sentence: str) -> None:
    print(f"torchport: {sentence}", file=sys.stderr)  # noqa: T201
