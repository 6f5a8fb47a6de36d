"""Trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchport.plugin import as_images, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ProjectTracker


class TrackioTracker(ProjectTracker):
    """Records to Trackio's local database (`TRACKIO_DIR`), or to a Space.

    A run goes on where it stopped with `name="..."` and `resume="allow"`.

    Args:
        run_name: Name of the project.
        **kwargs: As for `trackio.init`.
    """

    name = "trackio"

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run; nested ones stay nested. They are sent with the first values."""
        self._run.config.update(plain(values))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers, texts and mappings of such."""
        self._run.log({name: plain(value) for name, value in values.items()}, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; several under one name are numbered: `name/0`, …. `kwargs` are those of `trackio.Image`."""
        images = {}
        for name, value in values.items():
            several = as_images(value, dataformats)
            for index, image in enumerate(several):
                if image.shape[-1] == 1:  # it takes three or four channels
                    image = image.repeat(3, axis=-1)
                images[name if len(several) == 1 else f"{name}/{index}"] = self._service.Image(
                    image, **kwargs
                )
        self._run.log(images, step=step)
