"""Discovery with the real torch_tpu on a machine without a TPU: a reason, never an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torchport.errors import UnavailableError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import Topology

REASON = "no TPU chip is attached to the PCI bus of this machine (is this a TPU virtual machine?)"


def test_the_runtime_itself_raises_where_torch_accelerator_answers():
    import torch_tpu  # noqa: F401

    with pytest.raises(RuntimeError, match=r"Use torch\.accelerator\.is_available instead"):
        torch.tpu.is_available()
    assert torch.accelerator.is_available() is False


def test_the_probe_says_why_and_the_plan_takes_the_processor():
    found = discover({})
    probe = next(found.probe(spec) for spec in found.specs("backend") if spec.name == "tpu")
    assert (probe.available, probe.reason) == (False, REASON)
    assert not found.failures
    assert plan(Request(), {}, found, Topology()).backend == "cpu"
    with pytest.raises(UnavailableError) as caught:
        plan(Request(arguments={"backend": "tpu"}), {}, found, Topology())
    assert caught.value.reason == REASON


def test_doctor_reports_it_and_imports_no_runtime():
    code = (
        "import sys\nfrom torchport.plan.discovery import discover\n"
        "found = discover({})\nprint([s.device_type for s in found.specs('backend') if s.name == 'tpu'],"
        " 'torch_tpu' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["['tpu']", "False", "False"]
    command = [sys.executable, "-m", "torchport", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
    )
    reasons = {item["name"]: item["reason"] for item in json.loads(done.stdout)["probes"]}
    assert reasons["tpu"] == REASON
