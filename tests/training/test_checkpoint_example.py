"""The example that fine-tunes a real checkpoint, where the package with its weights is: `make test-examples`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.plugins,
    pytest.mark.skipif(
        "EXAMPLES_WITH_CHECKPOINTS" not in os.environ,
        reason="takes minutes, 90 MB of weights and Transformers",
    ),
]
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "deepspeed_finetune.py"


def test_a_bert_type_checkpoint_learns_more_than_the_majority_class_in_one_epoch(tmp_path):
    command = [sys.executable, "-m", "torchport", "launch", "--strategy", "deepspeed", "--zero-stage", "2"]
    done = subprocess.run(
        [*command, "--num-processes", "2", str(EXAMPLE), "--epochs", "1", "--output-dir", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (majority,) = map(float, re.findall(r"majority class: ([\d.]+)%", done.stdout))
    (accuracy,) = map(float, re.findall(r"accuracy on held-out texts ([\d.]+)%", done.stdout))
    assert accuracy > 1.5 * majority, done.stdout
    assert "ZeRO stage 2, precision no, 2 micro-batches of 16 for each step" in done.stdout
    assert (tmp_path / "checkpoint" / "manifest.json").is_file()
