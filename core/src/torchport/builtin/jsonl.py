"""Metrics as lines of JSON in one file, readable while training."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchport.plugin.specs import TrackerSpec
from torchport.plugin.tracker import Tracker
from torchport.plugin.values import as_images, as_table, plain

if TYPE_CHECKING:
    import numpy as np


class JsonLinesTracker(Tracker):
    """Appends one JSON object a line to `<logging_dir>/<run_name>.jsonl`.

    Each line has `time` (seconds since 1970), `step` where one was given, and the metrics by name; a metric of the
    name `time` or `step` takes that place. A line is handed to the operating system at once, so `tail -f` follows
    the training and a crash loses nothing. Tensors and arrays of one element become numbers, larger ones lists;
    not-a-number and the infinities, which JSON does not know, become the texts `"nan"`, `"inf"` and `"-inf"`.
    Images become PNG files in `<run_name>.images/`, which their line names.

    A run that is started again appends to the same file; a line that a crash has cut off stays as it is.
    """

    def __init__(
        self, spec: TrackerSpec, config: Any = None, *, run_name: str = "", logging_dir: str = ""
    ) -> None:
        super().__init__(spec, config, run_name=run_name, logging_dir=logging_dir)
        self.path = Path(logging_dir or ".") / f"{run_name or 'metrics'}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        if _cut_off(self.path):
            self._append(b"\n")

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

    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, *, dataformats: str = "NHWC", **kwargs: Any
    ) -> None:
        """Write images as PNG files, and append one line with their paths, relative to the file of metrics.

        Args:
            values: By name: an array or a tensor, or a list of such (`torchport.plugin.as_images`).
            step: What they belong to.
            dataformats: What the dimensions mean.
            **kwargs: Not used.
        """
        paths: dict[str, list[str]] = {}
        folder = self.path.with_suffix(".images")
        stamp = f"{time.time_ns()}" if step is None else f"{step:08d}"
        for name, value in values.items():
            paths[name] = []
            for index, image in enumerate(as_images(value, dataformats)):
                file = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{stamp}-{index}.png"
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(png(image))
                paths[name].append(f"{folder.name}/{file.name}")
        self.log(paths, step)

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line with the table under its name, as a list of objects."""
        names, rows = as_table(columns, data, dataframe)
        self.log({table_name: [dict(zip(names, row, strict=True)) for row in rows]}, step)

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **_as_json(record)}, allow_nan=False)
        self._append(line.encode() + b"\n")

    def _append(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]


def _cut_off(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _as_json(value: Any) -> Any:
    """Convert to what JSON can hold."""
    value = plain(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, set, frozenset)):
        return [_as_json(item) for item in value]
    return str(value)


def png(image: np.ndarray[Any, Any]) -> bytes:
    """Return an image of shape `(height, width, 1, 3 or 4)` and dtype uint8 as the bytes of a PNG file.

    Source: the PNG specification (https://www.w3.org/TR/png-3/): one IDAT chunk, no filter.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = image.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
