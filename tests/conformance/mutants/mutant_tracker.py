"""Trackers that write lines of JSON, each wrong in one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchport.plugin import Tracker, plain


class SteadyTracker(Tracker):
    """Right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lines: list[str] = []

    def log(self, metrics: Mapping[str, Any], /, step: int | None = None) -> None:
        self.lines.append(json.dumps({"step": step, **plain(dict(metrics))}))

    def close(self) -> None:
        Path(self.logging_dir, "records.jsonl").write_text("".join(f"{line}\n" for line in self.lines))


class DropsSteps(SteadyTracker):
    def log(self, metrics, /, step=None) -> None:
        if step is None or step % 7 != 6:
            super().log(metrics, step)


class StepsFromOne(SteadyTracker):
    def log(self, metrics, /, step=None) -> None:
        super().log(metrics, step + 1 if step is not None else None)


class NeverFlushes(SteadyTracker):
    def close(self) -> None:
        self.lines = self.lines[: len(self.lines) // 8 * 8]
        super().close()


class LosesMetrics(SteadyTracker):
    def log(self, metrics, /, step=None) -> None:
        super().log(dict(list(metrics.items())[:1]), step)


class NumbersAsTexts(SteadyTracker):
    def log(self, metrics, /, step=None) -> None:
        super().log(
            {name: value if isinstance(value, float) else str(value) for name, value in metrics.items()}, step
        )


class ConfigEndsIt(SteadyTracker):
    def store_config(self, values) -> None:
        super().store_config(values)
        self.close()
        self.log = lambda *args, **kwargs: None
