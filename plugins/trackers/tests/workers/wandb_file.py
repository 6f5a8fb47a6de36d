"""The file that wandb writes when it is offline."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(file: str | Path) -> Iterator[Any]:
    """Read a `.wandb` file: records in blocks of 32 KiB, in the format of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = Path(file).read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            found = wandb_internal_pb2.Record()
            found.ParseFromString(parts)
            parts = b""
            yield found
