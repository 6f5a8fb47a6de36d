"""Hand metrics to the trackers of the plan, on the main process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torchport.errors import ConfigurationError, TorchportError
from torchport.plan.decision import Decision
from torchport.plan.registry import load_reference
from torchport.plugin.tracker import Tracker


class Tracking:
    """The trackers of a run. On other processes than the main one there are none.

    A tracker that fails does not stop the training: its first failure is reported, and it is called again at
    the next occasion.

    Args:
        decision: The slot `trackers` of the plan.
        active: Whether this process tracks.
        logging_dir: Folder for trackers that write files.
    """

    def __init__(self, decision: Decision, *, active: bool, logging_dir: str | None) -> None:
        self.decision = decision
        self.active = active
        self.logging_dir = logging_dir or ""
        self.trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()

    def open(self, run_name: str, config: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
        """Build the trackers and record the hyper-parameters.

        Args:
            run_name: Name of the experiment.
            config: Hyper-parameters by name.
            options: By name of a tracker, further arguments of its construction.

        Raises:
            ConfigurationError: if `options` names a tracker that the plan does not have.
            TorchportError: if a tracker cannot be built.
        """
        unknown = sorted(set(options) - set(self.decision.choice))
        if unknown:
            raise ConfigurationError(
                f"init_trackers has arguments for {', '.join(unknown)}",
                found=f"the trackers of this run are: {self.decision.name}",
                hint=f"TORCHPORT_TRACKERS={unknown[0]}, or Accelerator(log_with={unknown[0]!r})",
            )
        if not self.active:
            return
        for spec in self.decision.specs:
            try:
                tracker = load_reference(spec.factory)(
                    spec, None, run_name=run_name, logging_dir=self.logging_dir, **options.get(spec.name, {})
                )
            except Exception as error:
                raise TorchportError(
                    f"tracker {spec.name!r} ({self.decision.source}) could not be built",
                    reason=f"{type(error).__name__}: {error}",
                ) from error
            self.trackers[spec.name] = tracker
            if config is not None:
                self._try(spec.name, functools.partial(tracker.store_config, config))

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Hand metrics to every tracker."""
        for name, tracker in self.trackers.items():
            self._try(name, functools.partial(tracker.log, metrics, step))

    def get(self, name: str) -> Tracker | None:
        """Return a tracker by name; `None` on processes that do not track.

        Raises:
            ConfigurationError: if the plan has no such tracker, or it has not been opened.
        """
        if not self.active and name in self.decision.choice:
            return None
        if name not in self.trackers:
            raise ConfigurationError(
                f"there is no tracker {name!r}",
                found=f"open trackers: {', '.join(self.trackers) or 'none'}",
                hint="init_trackers('name of the run') first"
                if name in self.decision.choice
                else f"TORCHPORT_TRACKERS={name}, or Accelerator(log_with={name!r})",
            )
        return self.trackers[name]

    def close(self) -> None:
        """End every tracker's run."""
        for name, tracker in self.trackers.items():
            self._try(name, tracker.close)
        self.trackers.clear()

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                print(  # noqa: T201
                    f"torchport: tracker {name!r} failed, and training goes on: {type(error).__name__}: {error}",
                    file=sys.stderr,
                )
