"""What must hold of every step and every start."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess
WORKERS = Path(__file__).parent / "workers"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_makes_no_hook_call_no_environment_read_and_no_registry_look_up(run_worker, launch, processes):
    for rank in run_worker(launch(processes), "monitored.py"):
        assert rank["steps"] == {}
        assert set(rank["control"]) == {"hook calls", "environment reads", "registry look-ups"}


def test_processes_with_different_plans_stop_and_name_the_slot_and_the_ranks(launch):
    started = time.monotonic()
    finished = subprocess.run(
        [*launch(2), str(WORKERS / "mismatched.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - started < 30
    assert finished.returncode == 1
    assert "different plans" in finished.stderr
    assert "precision: 'no' on rank 0, 'bf16' on rank 1" in finished.stderr
    assert "trained all the same" not in finished.stdout


def test_an_argument_that_overrides_a_variable_is_reported_once_by_the_main_process(launch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from torchport import Accelerator\nAccelerator(precision='no')\nAccelerator(precision='no')\n"
    )
    finished = subprocess.run(
        [*launch(2), str(script)],
        env={**os.environ, "TORCHPORT_PRECISION": "bf16"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    reports = [line for line in finished.stderr.splitlines() if "overrides" in line]
    assert len(reports) == 1
    assert "Accelerator precision='no'" in reports[0]
    assert "TORCHPORT_PRECISION=bf16" in reports[0]


def test_a_healthy_run_prints_nothing_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from torchport import Accelerator\na = Accelerator()\na.print('mine')\na.end_training()\n"
    )
    finished = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "mine\n", "")
