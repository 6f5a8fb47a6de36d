"""Recording with real services, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "record.py"
ALL = "TRACKERS_OF_ALL_SERVICES" in os.environ
collect_ignore = [] if ALL else ["test_all_services.py", "test_conformance.py"]
"""`make test-trackers` sets the variable, and installs the packages of all services."""


@pytest.fixture(scope="session")
def record(tmp_path_factory):
    """Record with services, all in one process with a home of its own, and return what it reads back."""

    def run(*services: str) -> dict:
        folder = tmp_path_factory.mktemp("-".join(services))
        done = subprocess.run(
            [sys.executable, WORKER, ",".join(services), folder],
            env={**os.environ, "HOME": str(folder), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((folder / "answers.json").read_text())

    return run


@pytest.fixture(scope="session")
def expected_services() -> tuple[str, ...]:
    """The trackers whose packages must be installed."""
    light = ("tensorboard", "wandb")
    return (*light, "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio") if ALL else light


@pytest.fixture
def flat_config() -> dict:
    """The worker's configuration, flattened."""
    return {"lr": 0.5, "model/layers": 3, "model/name": "mlp", "sizes": "[8, 16]", "bias": True}


@pytest.fixture
def nested_config() -> dict:
    """The worker's configuration."""
    return {"lr": 0.5, "model": {"layers": 3, "name": "mlp"}, "sizes": [8, 16], "bias": True}
