"""SwanLab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin import as_images, as_table, flatten, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, numbers_and_texts, service


class SwanLabTracker(ServiceTracker):
    """Records to an experiment of SwanLab.

    An experiment goes on with `id="..."` and `resume="allow"`; `mode="offline"` or `"local"` records to a folder.

    Args:
        run_name: Name of the project.
        **kwargs: As for `swanlab.init`.
    """

    name = "swanlab"

    @on_main_process
    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._swanlab = service("swanlab", "swanlab")
        self._run = self._swanlab.init(**{"project": run_name, **kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run; nested ones stay nested."""
        self._swanlab.config.update(plain(values))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers, nested ones as `a/b`, and texts."""
        numbers, texts = numbers_and_texts(flatten(values))
        data = {**numbers, **{name: self._swanlab.Text(text) for name, text in texts.items()}}
        self._run.log(data, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; `kwargs` are those of `swanlab.Image`."""
        images = {
            name: [
                self._swanlab.Image(image[..., 0] if image.shape[-1] == 1 else image, **kwargs)
                for image in as_images(value, dataformats)
            ]
            for name, value in values.items()
        }
        self._run.log(images, step=step)

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
        """Record a table."""
        names, rows = as_table(columns, data, dataframe)
        table = self._swanlab.echarts.Table()
        table.add(names, rows, **kwargs)
        self._run.log({table_name: table}, step=step)

    @on_main_process
    def finish(self) -> None:
        """End the experiment."""
        if self._run is not None:
            self._run.finish()
