"""Run a script in real processes, and hand back what each of them wrote."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TIMEOUT = 240.0  # seconds


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    Attributes:
        output: What it printed on both streams.
        ranks: What its processes wrote to `rankN.json`, in order of rank.
    """

    output: str
    ranks: list[dict[str, Any]]


def _stacks(process: subprocess.Popen[str]) -> str:
    """End a job that hangs: each Python process of it prints its stacks when it is aborted."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGABRT)
    output, _ = process.communicate(timeout=30)
    return output


def run_job(
    command: Sequence[str | Path],
    script: Path,
    folder: Path,
    *arguments: object,
    environ: Mapping[str, str] | None = None,
    code: int = 0,
) -> Job:
    """Run `command script folder arguments...` to its end.

    Args:
        command: What starts the script, such as `torchport launch --num-processes 2`.
        script: The worker.
        folder: Where the worker is to write `rankN.json`.
        arguments: Further arguments of the worker.
        environ: Variables to set.
        code: The exit code that the job must end with.
    """
    process = subprocess.Popen(
        [str(part) for part in (*command, script, folder, *arguments)],
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        output = f"hung for {TIMEOUT} seconds; where each process was:\n{_stacks(process)}"
    assert process.returncode == code, output
    return Job(output, [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))])


def checks_of(script: Path) -> list[str]:
    """Return the names of a worker's functions `check_...`, in order, without importing it."""
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if function.name.startswith("check_")]
