"""The examples run as their own text says, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(command: list[str], folder: Path) -> str:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def accuracy(output: str) -> float:
    return float(re.search(r"accuracy ([\d.]+) (?:on|in)", output)[1])


def test_digits_learns_and_goes_on_from_its_checkpoint_with_the_same_result(launch, tmp_path):
    script = [str(EXAMPLES / "digits.py")]
    whole = run([*launch(2), *script, "--epochs", "8", "--output-dir", "whole"], tmp_path)
    assert accuracy(whole) >= 0.95
    assert "plan for 2 processes" in whole
    run([*launch(2), *script, "--epochs", "3", "--output-dir", "parts"], tmp_path)
    rest = run([*launch(2), *script, "--epochs", "8", "--output-dir", "parts", "--resume"], tmp_path)
    assert "resumed after epoch 3" in rest
    assert accuracy(rest) == accuracy(whole)


def test_accumulation_learns_in_bfloat16_as_the_launcher_says(launch, tmp_path):
    output = run([*launch(2), "--precision", "bf16", str(EXAMPLES / "accumulation.py")], tmp_path)
    assert accuracy(output) >= 0.9
    assert "in bf16" in output


def test_local_sgd_learns_with_parameters_averaged_every_eight_steps(launch, tmp_path):
    assert accuracy(run([*launch(2), str(EXAMPLES / "local_sgd.py")], tmp_path)) >= 0.9


def test_an_example_runs_without_a_launcher(tmp_path):
    output = run([sys.executable, str(EXAMPLES / "digits.py"), "--epochs", "1"], tmp_path)
    assert "plan for 1 process" in output
