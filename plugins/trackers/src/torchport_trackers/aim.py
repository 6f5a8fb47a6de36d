"""Aim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchport.plugin import as_images, flatten, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, numbers_and_texts, service


class AimTracker(ServiceTracker):
    """Records to a run in the Aim repository `<logging_dir>/.aim`.

    A run goes on where it stopped with `run_hash="..."`.

    Args:
        run_name: Name of the run.
        logging_dir: Folder of the repository, or its address.
        **kwargs: As for `aim.Run`.
    """

    name = "aim"
    requires_logging_directory = True

    @on_main_process
    def __init__(self, run_name: str, logging_dir: str = ".", **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._aim = service("aim", "aim")
        self._run = self._aim.Run(**{"repo": logging_dir, **kwargs})
        self._run.name = run_name

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters under `hparams`; nested ones stay nested."""
        self._run["hparams"] = plain(values)

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers as metrics (nested ones as `a/b`) and texts as texts; `kwargs` are those of `Run.track`."""
        numbers, texts = numbers_and_texts(flatten(values))
        for name, number in numbers.items():
            self._run.track(number, name=name, step=step, **kwargs)
        for name, text in texts.items():
            self._run.track(self._aim.Text(text), name=name, step=step, **kwargs)

    @on_main_process
    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        dataformats: str = "NHWC",
        **kwargs: Mapping[str, Any],
    ) -> None:
        """Record images; `aim_image` in `kwargs` holds arguments of `aim.Image`, `track` those of `Run.track`."""
        for name, value in values.items():
            images = [
                self._aim.Image(
                    image[..., 0] if image.shape[-1] == 1 else image,
                    **{"format": "png", **kwargs.get("aim_image", {})},
                )
                for image in as_images(value, dataformats)
            ]
            self._run.track(images, name=name, step=step, **kwargs.get("track", {}))

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.close()
