"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchport.plugin import as_images, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ProjectTracker


class WandBTracker(ProjectTracker):
    """Records to a run of Weights & Biases.

    A run goes on where it stopped with `id="..."` and `resume="allow"`. `WANDB_MODE=offline` records to a folder.

    Args:
        run_name: Name of the project.
        **kwargs: As for `wandb.init`.
    """

    name = "wandb"

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run; nested ones stay nested."""
        self._run.config.update(plain(values), allow_val_change=True)

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values of any type that wandb knows; `kwargs` are those of its `log`."""
        self._run.log(_numbers(values), step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; `kwargs` are those of `wandb.Image`."""
        images = {
            name: [self._service.Image(image, **kwargs) for image in as_images(value, dataformats)]
            for name, value in values.items()
        }
        self._run.log(images, step=step)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert tensors of one element; anything else is the service's to take."""
    return {
        name: _numbers(value)
        if isinstance(value, Mapping)
        else plain(value)
        if getattr(value, "size", None) == 1
        or (callable(getattr(value, "numel", None)) and value.numel() == 1)
        else value
        for name, value in values.items()
    }
