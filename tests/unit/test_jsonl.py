"""Metrics as lines of JSON."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchport.builtin.jsonl import JsonLinesTracker
from torchport.plan.discovery import discover


@pytest.fixture
def tracker(tmp_path: Path):
    spec = discover({}, entry_points=()).find("tracker", "jsonl", "the test").spec
    made = JsonLinesTracker(spec, run_name="run", logging_dir=str(tmp_path / "logs"))
    yield made
    made.close()


def lines(tracker: JsonLinesTracker) -> list[dict]:
    """Read the file as another process would, while it is open for writing."""
    return [json.loads(line) for line in tracker.path.read_text().splitlines()]


def test_a_line_can_be_read_as_soon_as_it_is_logged(tracker, tmp_path):
    tracker.log({"loss": 0.5}, step=3)
    (line,) = lines(tracker)
    assert tracker.path == tmp_path / "logs" / "run.jsonl"
    assert line.pop("time") > 1_600_000_000
    assert line == {"step": 3, "loss": 0.5}


def test_tensors_and_arrays_become_numbers_and_lists(tracker):
    tracker.log(
        {
            "scalar": torch.tensor(1.5, requires_grad=True),
            "one": torch.tensor([[2]]),
            "many": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
            "numpy": np.float32(0.25),
            "flag": np.bool_(True),
            "array": np.arange(3),
        }
    )
    (line,) = lines(tracker)
    del line["time"]
    assert line == {
        "scalar": 1.5,
        "one": 2,
        "many": [1.0, 2.0],
        "numpy": 0.25,
        "flag": True,
        "array": [0, 1, 2],
    }


def test_numbers_that_json_does_not_know_become_texts(tracker):
    tracker.log({"a": float("nan"), "b": torch.tensor(float("-inf"))})
    (line,) = lines(tracker)
    assert (line["a"], line["b"]) == ("nan", "-inf")


def test_the_configuration_is_one_line(tracker):
    tracker.store_config({"lr": 0.1, "layers": (1, 2), "path": Path("x")})
    assert lines(tracker)[0]["config"] == {"lr": 0.1, "layers": [1, 2], "path": "x"}


def test_a_table_is_a_list_of_objects(tracker):
    tracker.log_table("samples", ["text", "score"], [["a", 1], ["b", 2]], step=1)
    assert lines(tracker)[0]["samples"] == [{"text": "a", "score": 1}, {"text": "b", "score": 2}]


def test_images_are_files_that_their_line_names(tracker):
    red = np.zeros((1, 2, 3, 3), np.uint8)
    red[..., 0] = 255
    tracker.log_images({"a/b": red, "grey": [torch.tensor([[0.0, 1.0]])]}, step=4)
    (line,) = lines(tracker)
    assert line["a/b"] == ["run.images/a_b-00000004-0.png"]
    files = [tracker.path.parent / line[name][0] for name in ("a/b", "grey")]
    assert [decoded(file.read_bytes()) for file in files] == [
        (3, 2, 2, [[255, 0, 0] * 3] * 2),
        (2, 1, 0, [[0, 255]]),
    ]


def decoded(png: bytes) -> tuple[int, int, int, list[list[int]]]:
    """Take a PNG file without filters apart: width, height, kind of colours, lines."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        kind, data = png[position + 4 : position + 8], png[position + 8 : position + 8 + length]
        (crc,) = struct.unpack(">I", png[position + 8 + length : position + 12 + length])
        assert crc == zlib.crc32(kind + data)
        chunks[kind], position = data, position + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    pixels = zlib.decompress(chunks[b"IDAT"])
    size = len(pixels) // height
    rows = [list(pixels[row * size : (row + 1) * size]) for row in range(height)]
    assert depth == 8
    assert all(row[0] == 0 for row in rows)
    return width, height, colour, [row[1:] for row in rows]


def test_a_table_may_be_a_data_frame(tracker):
    frame = SimpleNamespace(columns=["n"], values=np.array([[1], [2]]))
    tracker.log_table("samples", dataframe=frame)
    assert lines(tracker)[0]["samples"] == [{"n": 1}, {"n": 2}]


def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next(tracker):
    tracker.close()
    tracker.path.write_text('{"time": 1, "lo')
    again = JsonLinesTracker(tracker.spec, run_name="run", logging_dir=str(tracker.path.parent))
    again.log({"loss": 0.5})
    again.close()
    assert json.loads(tracker.path.read_text().splitlines()[1])["loss"] == 0.5


def test_a_run_that_is_started_again_appends(tracker):
    tracker.log({"loss": 1.0})
    tracker.close()
    again = JsonLinesTracker(tracker.spec, run_name="run", logging_dir=str(tracker.path.parent))
    again.log({"loss": 0.5})
    again.close()
    assert [line["loss"] for line in lines(tracker)] == [1.0, 0.5]


def test_logging_after_the_end_is_an_error(tracker):
    tracker.close()
    with pytest.raises(ValueError, match="closed file"):
        tracker.log({"loss": 1.0})
