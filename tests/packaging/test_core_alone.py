"""The core and the backend of processors by themselves; what a plugin brings comes and goes with it.

The whole of the core's tests, without any plugin: `make test-core`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parents[2]
TESTS = (
    "unit/test_discovery.py",
    "unit/test_selection.py",
    "unit/test_launch_config.py",
    "unit/test_specs.py",
)
TRAIN = """
import json
import sys
import torch
from torchport import Accelerator
from torchport.errors import TorchportError

for asked in json.loads(sys.argv[1]):
    try:
        accelerator = Accelerator(**asked)
    except TorchportError as error:
        print(error)
        continue
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    print(accelerator.plan.strategy, accelerator.plan.precision)
"""
FLAGS = {
    "fsdp_version": "fsdp",
    "zero_stage": "deepspeed",
    "fp8_backend": "fp8",
    "megatron_lm_tp_degree": "megatron",
}


@pytest.fixture
def script(environment):
    path = environment.folder / "train.py"
    path.write_text(TRAIN)
    return str(path)


def test_tests_of_the_core_pass_without_any_plugin(environment):
    listing = environment.run("python", "-m", "torchport", "plugins").stdout
    assert "torchport-cpu" in listing
    assert not any(
        f"torchport-{name}" in listing for name in ("fsdp", "deepspeed", "fp8", "megatron", "trackers")
    )
    done = environment.run(
        "python", "-m", "pytest", *(str(ROOT / "tests" / name) for name in TESTS), cwd=ROOT
    )
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
    assert "skipped" not in done.stdout


def test_a_plugin_brings_its_flags_and_takes_them_with_it(environment, build, script):
    def refused(flag: str) -> str:
        return environment.run("torchport", "launch", f"--{flag}", "2", script, code=2).stderr

    for flag, plugin in FLAGS.items():
        assert "No such option" in refused(flag)
        assert f"pip install torchport-{plugin}" in refused(flag)
    asked = [
        {"strategy": "fsdp"},
        {"strategy": "deepspeed"},
        {"strategy": "megatron"},
        {"precision": "fp8"},
        {},
    ]
    said = environment.run("python", script, json.dumps(asked)).stdout
    for plugin in FLAGS.values():
        assert f"pip install torchport-{plugin}" in said
    assert said.endswith("single no\n")

    environment.pip("install", "--no-deps", "--no-index", *map(str, build(ROOT / "plugins" / "fsdp")))
    assert "--fsdp-version" in environment.run("torchport", "launch", "--help").stdout
    trained = environment.run(
        "torchport", "launch", "--use_fsdp", "--fsdp_version", "2", script, "[{}]"
    ).stdout
    assert trained.endswith("fsdp no\n")

    environment.pip("uninstall", "-y", "torchport-fsdp")
    assert "--fsdp-version" not in environment.run("torchport", "launch", "--help").stdout
    assert "pip install torchport-fsdp" in refused("fsdp_version")
