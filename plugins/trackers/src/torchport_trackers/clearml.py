"""ClearML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin import as_images, as_table, flatten, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, numbers_and_texts, service


class ClearMLTracker(ServiceTracker):
    """Records to a task of ClearML: the one that is open already, which then stays open, or a new one.

    A task goes on with `continue_last_task=True`, or the task's id. `CLEARML_OFFLINE_MODE=1` records to an archive.

    Args:
        run_name: Name of the project and the task.
        **kwargs: As for `clearml.Task.init`.
    """

    name = "clearml"

    @on_main_process
    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        task = service("clearml", "clearml").Task
        current = task.current_task()
        self._owner = current is None
        self._run = current or task.init(**{"project_name": run_name, "task_name": run_name, **kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters as the configuration of the task; nested ones stay nested."""
        self._run.connect_configuration(plain(values))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values.

        Args:
            values: Numbers become scalars, in the plot `a` as the series `b` if they are named or nested `a/b`; without
                a step, single values. Texts become lines of the console.
            step: What they belong to.
            **kwargs: As for the logger's `report_scalar`, `report_single_value` or `report_text`.
        """
        logger = self._run.get_logger()
        numbers, texts = numbers_and_texts(flatten(values))
        for name, number in numbers.items():
            if step is None:
                logger.report_single_value(name=name, value=number, **kwargs)
            else:
                title, series = _names(name)
                logger.report_scalar(title=title, series=series, value=number, iteration=step, **kwargs)
        for name, text in texts.items():
            where = "" if step is None else f" at {step}"
            logger.report_text(f"{name}{where}: {text}", **{"print_console": False, **kwargs})

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; several under one name are numbered. `kwargs` are those of the logger's `report_image`."""
        logger = self._run.get_logger()
        for name, value in values.items():
            title, series = _names(name)
            images = as_images(value, dataformats)
            for index, image in enumerate(images):
                label = series if len(images) == 1 else f"{series}/{index}"
                image = image[..., 0] if image.shape[-1] == 1 else image
                logger.report_image(title=title, series=label, iteration=step or 0, image=image, **kwargs)

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
        """Record a table; `kwargs` are those of the logger's `report_table`."""
        names, rows = as_table(columns, data, dataframe)
        title, series = _names(table_name)
        self._run.get_logger().report_table(
            title=title, series=series, iteration=step or 0, table_plot=[names, *rows], **kwargs
        )

    @on_main_process
    def finish(self) -> None:
        """Send what is left; close the task if this tracker has opened it."""
        if self._run is not None and self._owner:
            self._run.close()
        elif self._run is not None:
            self._run.flush(wait_for_uploads=True)


def _names(name: str) -> tuple[str, str]:
    """Return the plot and the series that a name stands for."""
    title, _, series = name.rpartition("/")
    return title or name, series
