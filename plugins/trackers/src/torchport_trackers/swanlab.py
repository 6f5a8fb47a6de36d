"""SwanLab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin import as_images, flatten, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ProjectTracker, numbers_and_texts


class SwanLabTracker(ProjectTracker):
    """Records to an experiment of SwanLab.

    An experiment goes on with `id="..."` and `resume="allow"`; `mode="offline"` or `"local"` records to a folder.

    Args:
        run_name: Name of the project.
        **kwargs: As for `swanlab.init`.
    """

    name = "swanlab"

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run; nested ones stay nested."""
        self._service.config.update(plain(values))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers, nested ones as `a/b`, and texts."""
        numbers, texts = numbers_and_texts(flatten(values))
        data = {**numbers, **{name: self._service.Text(text) for name, text in texts.items()}}
        self._run.log(data, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; `kwargs` are those of `swanlab.Image`."""
        images = {
            name: [
                self._service.Image(image[..., 0] if image.shape[-1] == 1 else image, **kwargs)
                for image in as_images(value, dataformats)
            ]
            for name, value in values.items()
        }
        self._run.log(images, step=step)

    def _table(self, names: Sequence[str], rows: Sequence[Sequence[Any]], **kwargs: Any) -> Any:
        table = self._service.echarts.Table()
        table.add(names, rows, **kwargs)
        return table
