"""Metrics as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

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
