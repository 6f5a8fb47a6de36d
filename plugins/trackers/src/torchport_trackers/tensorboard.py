"""TensorBoard, through PyTorch's own `SummaryWriter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchport.plugin import as_images, as_table, flatten, plain
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, scalar, service


class TensorBoardTracker(ServiceTracker):
    """Writes event files to `<logging_dir>/<run_name>`; a run that is started again adds a file there.

    Args:
        run_name: Name of the run.
        logging_dir: Folder of all runs.
        **kwargs: As for `torch.utils.tensorboard.SummaryWriter`.
    """

    name = "tensorboard"
    requires_logging_directory = True

    @on_main_process
    def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
        super().__init__()
        service("tensorboard", "tensorboard")
        self.run_name = run_name
        self.logging_dir = str(Path(logging_dir) / run_name)
        writer = service("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._run = writer(self.logging_dir, **kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters of the run, flattened, in its own event file."""
        hparams = service("torch.utils.tensorboard.summary", "tensorboard").hparams
        for part in hparams({name: scalar(value) for name, value in flatten(values).items()}, {}):
            self._run.file_writer.add_summary(part)
        self._run.flush()

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values.

        Args:
            values: Numbers become scalars, texts texts, and mappings of numbers one chart with several lines.
            step: What they belong to.
            **kwargs: As for the writer's `add_scalar`, `add_text` or `add_scalars`.
        """
        for name, value in values.items():
            value = plain(value)
            if isinstance(value, (bool, int, float)):
                self._run.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, Mapping):
                self._run.add_scalars(name, flatten(value), global_step=step, **kwargs)
            else:
                self._run.add_text(name, str(value), global_step=step, **kwargs)
        self._run.flush()

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images; several under one name are numbered: `name/0`, `name/1`, …."""
        for name, value in values.items():
            images = as_images(value, dataformats)
            for index, image in enumerate(images):
                tag = name if len(images) == 1 else f"{name}/{index}"
                self._run.add_image(tag, image, global_step=step, dataformats="HWC", **kwargs)
        self._run.flush()

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
        """Record a table as a text in Markdown, which TensorBoard shows as a table."""
        names, rows = as_table(columns, data, dataframe)
        lines = [names, ["---"] * len(names), *rows]
        text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        self._run.add_text(table_name, text, global_step=step, **kwargs)
        self._run.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the event files."""
        if self._run is not None:
            self._run.close()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
