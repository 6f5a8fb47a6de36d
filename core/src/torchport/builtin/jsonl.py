"""Metrics as lines of JSON in one file, readable while training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchport.plugin.specs import TrackerSpec
from torchport.plugin.tracker import Tracker


class JsonLinesTracker(Tracker):
    """Appends one JSON object a line to `<logging_dir>/<run_name>.jsonl`.

    Each line has `time` (seconds since 1970), `step` where one was given, and the metrics by name. A line is
    handed to the operating system at once, so `tail -f` follows the training and a crash loses
    nothing. Tensors and arrays of one element become numbers, larger ones lists; not-a-number and the
    infinities, which JSON does not know, become the texts `"nan"`, `"inf"` and `"-inf"`.

    A run that is started again appends to the same file.
    """

    def __init__(
        self, spec: TrackerSpec, config: Any = None, *, run_name: str = "", logging_dir: str = ""
    ) -> None:
        super().__init__(spec, config, run_name=run_name, logging_dir=logging_dir)
        self.path = Path(logging_dir or ".") / f"{run_name or 'metrics'}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    @property
    def tracker(self) -> Path:
        """The file's path."""
        return self.path

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line.

        Raises:
            ValueError: if the tracker is closed.
        """
        self._write({**({} if step is None else {"step": step}), **metrics})

    def store_config(self, values: Mapping[str, Any]) -> None:
        """Append one line with all hyper-parameters under the key `config`."""
        self._write({"config": values})

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        """Append one line with the table under its name, as a list of objects."""
        self.log({name: [dict(zip(columns, row, strict=True)) for row in rows]}, step)

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **_as_json(record)}, allow_nan=False)
        self._file.write(line + "\n")


def _as_json(value: Any) -> Any:
    """Convert to what JSON can hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_as_json(item) for item in value]
    to_list = getattr(value, "tolist", None)  # tensors and arrays of any library
    if to_list is not None:
        items = to_list()
        while isinstance(items, list) and len(items) == 1:
            items = items[0]
        return _as_json(items)
    return str(value)
