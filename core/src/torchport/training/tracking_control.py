"""Tracking: the methods of `Accelerator` that hand metrics, images and tables to trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin.tracker import Tracker
from torchport.training.tracking import Tracking


class TrackingControl:
    """Hand what is measured to the open trackers; the class that mixes it in has `_tracking`."""

    _tracking: Tracking

    @property
    def trackers(self) -> list[Tracker]:
        """The open trackers of this process: nearly all are for the main one alone."""
        return list(self._tracking.trackers.values())

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
        strict: bool | None = None,
    ) -> None:
        """Open the trackers of the plan and those of the script's own; call it on every process.

        Args:
            project_name: Name of the experiment.
            config: Hyper-parameters to record.
            init_kwargs: By name of a tracker, further arguments for it.
            strict: Whether a tracker that fails ends the training, instead of being reported once; `None` takes what
                `TORCHPORT_TRACKERS_STRICT` says.

        Raises:
            ConfigurationError: if `init_kwargs` names a tracker that the run does not have.
            TrackerError: on the main process, if one cannot be opened and `strict` is set.
        """
        self._tracking.open(project_name, config, init_kwargs or {}, strict)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand metrics to every open tracker; call it on any process, the main one's count.

        Args:
            values: Numbers (tensors of one element too), short texts, or mappings of such, by name.
            step: What they belong to.
            log_kwargs: By name of a tracker, further arguments for its `log`.
        """
        self._tracking.log(values, step, log_kwargs)

    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand images to every open tracker.

        Args:
            values: By name: an array or a tensor `(n, height, width, channels)`, or a list of single images. Numbers
                are from 0 to 1, or whole from 0 to 255.
            step: What they belong to.
            log_kwargs: By name of a tracker, further arguments for its `log_images`.
        """
        self._tracking.log_images(values, step, log_kwargs)

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand a table to every open tracker.

        Args:
            table_name: Name of the table.
            columns: Names of the columns.
            data: The rows.
            dataframe: Instead of both: a data frame.
            step: What it belongs to.
            log_kwargs: By name of a tracker, further arguments for its `log_table`.
        """
        self._tracking.log_table(table_name, columns, data, dataframe, step, log_kwargs)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Return a tracker by name; where it is not open, one whose methods do nothing.

        Args:
            name: Name of the tracker.
            unwrap: Whether to return its vendor's own run instead: `None` where it is not open.

        Raises:
            ConfigurationError: if the run has no such tracker, or `init_trackers` has not been called.
        """
        tracker = self._tracking.get(name)
        return tracker.tracker if unwrap else tracker
