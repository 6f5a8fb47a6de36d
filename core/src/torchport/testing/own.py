"""Suites of the core's own plugins, where the kit must be told more than their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchport.testing.checks import Subject


class JsonLines:
    """Reads the records of the tracker that writes lines of JSON."""

    @classmethod
    def subject(cls) -> Subject:
        """Describe the tracker."""
        return Subject(kind="tracker", name="jsonl", verified_on="hardware")

    def read(self, folder: Path) -> list[Mapping[str, Any]]:
        """Return one mapping for each line."""
        return [
            json.loads(line)
            for path in sorted(folder.glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]


SUITES: dict[tuple[str, str], Any] = {("tracker", "jsonl"): JsonLines}
"""By kind and name."""
