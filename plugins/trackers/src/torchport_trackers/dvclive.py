"""DVCLive."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchport.plugin import as_images, as_table, flatten
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, scalar, service


class DVCLiveTracker(ServiceTracker):
    """Writes DVCLive's files: `params.yaml`, `metrics.json`, and a table for each metric.

    A run goes on where it stopped with `resume=True`.

    Args:
        run_name: Name of the run; DVCLive makes up the experiment's own name, unless `exp_name` is given.
        live: A `dvclive.Live` to use, instead of a new one.
        **kwargs: As for `dvclive.Live`.
    """

    name = "dvclive"

    @on_main_process
    def __init__(self, run_name: str, live: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._run = live if live is not None else service("dvclive", "dvclive").Live(**kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters as parameters, flattened."""
        self._run.log_params({name: scalar(value) for name, value in flatten(values).items()})

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers and texts, nested ones as `a/b`, and end DVCLive's step.

        Args:
            values: The values.
            step: What they belong to; without, DVCLive counts.
            **kwargs: As for `Live.log_metric`.
        """
        if step is not None:
            self._run.step = step
        for name, value in flatten(values).items():
            self._run.log_metric(name, scalar(value), **kwargs)
        self._run.next_step()

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Write images to `plots/images/<name>/<step>.png`, which DVC's tools show as a sequence."""
        for name, value in values.items():
            images = as_images(value, dataformats)
            for index, image in enumerate(images):
                image = image[..., 0] if image.shape[-1] == 1 else image
                folder = name if len(images) == 1 else f"{name}/{index}"
                self._run.log_image(f"{folder}/{self._run.step if step is None else step}.png", image)

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
        """Write a table as `<dir>/artifacts/<table_name>[-<step>].csv`."""
        import csv

        names, rows = as_table(columns, data, dataframe)
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", table_name)
        path = Path(self._run.artifacts_dir) / f"{stem}{'' if step is None else f'-{step}'}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *rows])

    @on_main_process
    def finish(self) -> None:
        """Write the summary, and save the experiment where there is a DVC repository."""
        if self._run is not None:
            self._run.end()
