"""MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchport.plugin import as_images, as_table, flatten
from torchport.tracking import on_main_process

from torchport_trackers.service import ServiceTracker, numbers_and_texts, scalar, service

_BATCH = 100
"""Most parameters that MLflow takes in one request."""


class MLflowTracker(ServiceTracker):
    """Records to a run of MLflow.

    A run goes on where it stopped with `run_id="..."`, or `MLFLOW_RUN_ID`.

    Args:
        experiment_name: Name of the experiment, which is made if need be.
        logging_dir: Folder or address to record to; by default what MLflow itself takes (`MLFLOW_TRACKING_URI`).
        run_id: The run to go on with.
        tags: Tags of the run.
        nested_run: Whether it is nested in the run that is active.
        run_name: Name of the run; by default MLflow makes one up.
        description: Its description.
    """

    name = "mlflow"

    @on_main_process
    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.run_name = run_name or experiment_name or ""
        self._mlflow = service("mlflow", "mlflow")
        if logging_dir:
            self._mlflow.set_tracking_uri(logging_dir)
        if experiment_name:
            self._mlflow.set_experiment(experiment_name)
        self._run = self._mlflow.start_run(
            run_id=run_id,
            run_name=run_name,
            nested=nested_run,
            tags=dict(tags) if tags else None,
            description=description,
        )
        self._id = self._run.info.run_id
        self._client = self._mlflow.MlflowClient()

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the hyper-parameters as parameters, flattened, and shortened to the length that MLflow takes."""
        validation = service("mlflow.utils.validation", "mlflow")
        longest = int(getattr(validation, "MAX_PARAM_VAL_LENGTH", 500))
        entities = service("mlflow.entities", "mlflow")
        params = [
            entities.Param(name, str(scalar(value))[:longest]) for name, value in flatten(values).items()
        ]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[first : first + _BATCH])

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record values.

        Args:
            values: Numbers, also nested, become metrics (`a/b`); texts become tags, which keep their last value.
            step: What they belong to.
            **kwargs: As for `mlflow.log_metrics`.
        """
        numbers, texts = numbers_and_texts(flatten(values))
        if numbers:
            self._mlflow.log_metrics(numbers, **{"step": step, "run_id": self._id, **kwargs})
        for name, text in texts.items():
            self._client.set_tag(self._id, name, text)

    @on_main_process
    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Record images by name and step (without a step: 0); `kwargs` are those of `MlflowClient.log_image`."""
        for name, value in values.items():
            images = as_images(value, dataformats)
            for index, image in enumerate(images):
                key = name if len(images) == 1 else f"{name}/{index}"
                self._client.log_image(self._id, image, **{"key": key, "step": step or 0, **kwargs})

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
        """Add a table to the artifact `<table_name>.json`, with a column `step` where one is given."""
        names, rows = as_table(columns, data, dataframe)
        table = {name: [row[index] for row in rows] for index, name in enumerate(names)}
        if step is not None:
            table = {"step": [step] * len(rows), **table}
        self._client.log_table(self._id, table, f"{table_name}.json", **kwargs)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self._client.set_terminated(self._id)
            active = self._mlflow.active_run()
            if active is not None and active.info.run_id == self._id:
                self._mlflow.end_run()
