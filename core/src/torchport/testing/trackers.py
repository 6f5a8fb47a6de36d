"""Level L1 for trackers: what is logged can be read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchport.errors import UnsupportedOperationError
from torchport.plan.registry import load_reference
from torchport.plugin.tracker import Tracker
from torchport.testing.checks import HERE, Check, Checks, NotClaimed, Place, Subject, require


class Bench:
    """Makes trackers, each for a run and in a folder of its own.

    Args:
        subject: The plugin under test.
        place: Where this runs, and the author's suite with its `read`.
    """

    def __init__(self, subject: Subject, place: Place) -> None:
        self.subject, self.place = subject, place
        self._runs = itertools.count()
        self.folder = place.folder

    def make(self) -> Tracker:
        """Build a tracker, as `init_trackers` does."""
        self.folder = self.place.folder / f"run{next(self._runs)}"
        self.folder.mkdir()
        spec: Any = self.subject.entry.spec
        config = load_reference(spec.config)() if spec.config else None
        made: Tracker = load_reference(spec.factory).build(
            spec, config, run_name="conformance", logging_dir=str(self.folder)
        )
        return made

    def records(self) -> Sequence[Mapping[str, Any]]:
        """Return what the tracker made last has recorded."""
        read = getattr(self.place.suite, "read", None)
        if read is None:
            raise NotClaimed(
                "no suite says how to read records back: --suite MODULE:CLASS with a method read(folder)"
            )
        records: Sequence[Mapping[str, Any]] = read(Path(self.folder))
        return records


@contextmanager
def tracker_bench(subject: Subject, place: Place) -> Iterator[Bench]:
    """Give checks a maker of trackers."""
    yield Bench(subject, place)


_checks = Checks("L1", tracker_bench, HERE)


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    return list(_checks)


def _with(records: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [record for record in records if name in record]


@_checks("tracker.builds", "it is built with a run's name and a folder, and has the name of its descriptor")
def tracker_builds(bench: Bench) -> None:
    """Build and close."""
    tracker = bench.make()
    try:
        require(tracker.name == bench.subject.name, f"its name is {tracker.name!r}")
        require(tracker.tracker is not None, "its property `tracker` gives nothing")
    finally:
        tracker.close()


@_checks("tracker.steps", "every step is recorded once, in order, with its own values")
def steps_are_recorded(bench: Bench) -> None:
    """Log forty steps, close, read."""
    tracker = bench.make()
    for step in range(40):
        tracker.log({"conformance_loss": 1.0 / (step + 1)}, step=step)
    tracker.close()
    found = [(r.get("step"), r["conformance_loss"]) for r in _with(bench.records(), "conformance_loss")]
    expected = [(step, 1.0 / (step + 1)) for step in range(40)]
    steps = [step for step, _ in found]
    require(steps == list(range(40)), f"of the steps 0 to 39 it has recorded {steps}")
    wrong = [pair for pair, wanted in zip(found, expected, strict=True) if abs(pair[1] - wanted[1]) > 1e-6]
    require(not wrong, f"with other values: {wrong[:3]}")


@_checks("tracker.last-record", "what was logged last is there after close()")
def last_record_is_written(bench: Bench) -> None:
    """Log once and close."""
    tracker = bench.make()
    tracker.log({"conformance_last": 0.5}, step=7)
    tracker.close()
    found = [record["conformance_last"] for record in _with(bench.records(), "conformance_last")]
    require(found == [0.5], f"it has recorded {found}")


@_checks("tracker.several-metrics", "metrics that were logged together keep their names and values")
def metrics_keep_their_names(bench: Bench) -> None:
    """Log three metrics at one step."""
    tracker = bench.make()
    tracker.log({"conformance/a": 1.0, "conformance/b": 2.0, "conformance/c": 3.0}, step=1)
    tracker.close()
    merged = {key: value for record in bench.records() for key, value in record.items()}
    found = [merged.get(f"conformance/{name}") for name in "abc"]
    require(found == [1.0, 2.0, 3.0], f"conformance/a, b and c are recorded as {found}")


@_checks("tracker.numbers", "numbers of Python, NumPy and PyTorch are taken as numbers")
def numbers_are_taken(bench: Bench) -> None:
    """Log one of each."""
    tracker = bench.make()
    values = {"integer": 3, "float": 3.0, "numpy": np.float32(3.0), "tensor": torch.tensor(3.0)}
    for name, value in values.items():
        tracker.log({f"conformance_{name}": value}, step=0)
    tracker.close()
    merged = {key: value for record in bench.records() for key, value in record.items()}
    for name in values:
        found = merged.get(f"conformance_{name}")
        require(found == 3, f"the {name} 3 is recorded as {found!r}")


@_checks("tracker.config", "hyper-parameters are taken: numbers, texts, lists and nested values")
def config_is_taken(bench: Bench) -> None:
    """Store a configuration and go on."""
    tracker = bench.make()
    tracker.store_config({"lr": 0.1, "name": "kit", "layers": [1, 2], "nested": {"depth": 3}})
    tracker.log({"conformance_after": 1.0}, step=0)
    tracker.close()
    require(_with(bench.records(), "conformance_after"), "what was logged after the configuration is lost")


@_checks("tracker.images", "images are taken")
def images_are_taken(bench: Bench) -> None:
    """Log two images of 8 x 8 pixels."""
    tracker = bench.make()
    try:
        tracker.log_images({"conformance_images": np.zeros((2, 8, 8, 3), dtype=np.uint8)}, step=0)
    except UnsupportedOperationError as error:
        raise NotClaimed(error.problem) from error
    finally:
        tracker.close()


@_checks("tracker.tables", "tables are taken")
def tables_are_taken(bench: Bench) -> None:
    """Log a table of two rows."""
    tracker = bench.make()
    try:
        tracker.log_table("conformance_table", columns=["x", "y"], data=[[1, "a"], [2, "b"]], step=0)
    except UnsupportedOperationError as error:
        raise NotClaimed(error.problem) from error
    finally:
        tracker.close()
