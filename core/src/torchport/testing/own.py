"""Suites of the core's own plugins, where the kit must be told more than their names."""

from __future__ import annotations

from typing import Any

SUITES: dict[tuple[str, str], Any] = {}
"""By kind and name."""
