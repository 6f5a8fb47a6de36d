"""Comet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin import as_images, as_table, flatten
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, numbers_and_texts, scalar, service


class CometMLTracker(ServiceTracker):
    """Records to an experiment of Comet.

    An experiment goes on with `experiment_key="..."` and `mode="get"`; `online=False` records to an archive.

    Args:
        run_name: Name of the project.
        **kwargs: As for `comet_ml.start`.
    """

    name = "comet_ml"

    @on_main_process
    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        names = {} if "project" in kwargs else {"project_name": run_name}
        self._run = service("comet_ml", "comet_ml").start(**{**names, **kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run, flattened."""
        self._run.log_parameters({name: scalar(value) for name, value in flatten(values).items()})

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values.

        Args:
            values: Numbers, also nested, become metrics (`a/b`); texts go to the tab "Other", which keeps the last.
            step: What they belong to.
            **kwargs: As for the experiment's `log_metrics`.
        """
        numbers, texts = numbers_and_texts(flatten(values))
        if step is not None:
            self._run.set_step(step)
        self._run.log_metrics(numbers, **{"step": step, **kwargs})
        for name, text in texts.items():
            self._run.log_other(name, text)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; several under one name are numbered: `name/0`, …. `kwargs` are those of `log_image`."""
        for name, value in values.items():
            images = as_images(value, dataformats)
            for index, image in enumerate(images):
                image = image[..., 0] if image.shape[-1] == 1 else image
                title = name if len(images) == 1 else f"{name}/{index}"
                options = {"name": title, "step": step, "image_minmax": (0, 255), **kwargs}
                self._run.log_image(image, **options)

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
        """Record a table as the asset `<table_name>.csv`; `kwargs` are those of the experiment's `log_asset_data`."""
        names, rows = as_table(columns, data, dataframe)
        text = io.StringIO()
        csv.writer(text).writerows([names, *rows])
        self._run.log_asset_data(text.getvalue(), **{"name": f"{table_name}.csv", "step": step, **kwargs})

    @on_main_process
    def finish(self) -> None:
        """Send what is left and end the experiment."""
        if self._run is not None:
            self._run.end()
