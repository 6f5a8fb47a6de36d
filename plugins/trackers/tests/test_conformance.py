"""The conformance kit on trackers whose files can be read without their service."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torchport.testing import TrackerConformance

WANDB_FILE = Path(__file__).parent / "workers" / "wandb_file.py"


class TestTensorBoard(TrackerConformance):
    tracker = "tensorboard"
    verified_on = "hardware"

    def read(self, folder: Path) -> list[Mapping[str, Any]]:
        """Return one mapping for each scalar of the event files."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "conformance"))
        events.Reload()
        return [
            {"step": event.step, tag: event.value}
            for tag in events.Tags()["scalars"]
            for event in events.Scalars(tag)
        ]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Let wandb write to a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(tmp_path_factory.mktemp("wandb")))
        yield


class TestWandB(TrackerConformance):
    tracker = "wandb"
    verified_on = "vendor runtime without device"

    def read(self, folder: Path) -> list[Mapping[str, Any]]:
        """Return one mapping for each row of the history of the last run, once its service has written the end."""
        spec = importlib.util.spec_from_file_location("wandb_file", WANDB_FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (file,) = Path(os.environ["WANDB_DIR"]).glob("wandb/latest-run/*.wandb")
        records, deadline = [], time.monotonic() + 30
        while not any(record.WhichOneof("record_type") == "exit" for record in records):
            assert time.monotonic() < deadline, f"{file} has no end"
            records = list(module.wandb_records(file))
        rows = [record.history.item for record in records if record.history.item]
        found = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row} for row in rows]
        return [{"step": row.pop("_step"), **row} for row in found]
