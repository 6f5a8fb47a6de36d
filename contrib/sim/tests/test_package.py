"""What the package promises where nothing is simulated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torchport_sim import probe

SOURCE = Path(__file__).parents[1]


def ask(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_number_of_devices_it_is_not_available_and_says_what_to_type(monkeypatch):
    monkeypatch.delenv("SIM_DEVICE_COUNT", raising=False)
    assert not probe().available
    assert probe().reason == "SIM_DEVICE_COUNT is not set: export SIM_DEVICE_COUNT=4 simulates four devices"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SIM_DEVICE_COUNT": "many"}, "SIM_DEVICE_COUNT='many' is not a number from 1 to 64"),
        ({"SIM_DEVICE_COUNT": "0"}, "SIM_DEVICE_COUNT='0' is not a number from 1 to 64"),
        ({"SIM_DEVICE_COUNT": "2", "SIM_VISIBLE_DEVICES": ""}, "SIM_VISIBLE_DEVICES is empty: it hides all devices"),
        (
            {"SIM_DEVICE_COUNT": "2", "SIM_VISIBLE_DEVICES": "1,2"},
            "SIM_VISIBLE_DEVICES='1,2' does not list different devices from 0 to 1 (SIM_DEVICE_COUNT=2)",
        ),
        (
            {"SIM_DEVICE_COUNT": "2", "SIM_MEMORY_LIMIT": "lots"},
            "SIM_MEMORY_LIMIT='lots' is not a number of bytes: 512MiB, for example",
        ),
    ],
)  # fmt: skip
def test_variables_that_cannot_be_read_are_the_reason(monkeypatch, variables, reason):
    for name in ("SIM_DEVICE_COUNT", "SIM_VISIBLE_DEVICES", "SIM_MEMORY_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = probe()
    assert (answer.available, answer.reason) == (False, reason)


def test_without_the_compiled_extension_the_reason_says_how_to_build_it(monkeypatch):
    monkeypatch.setenv("SIM_DEVICE_COUNT", "2")
    monkeypatch.setattr("sim_runtime.built", lambda: False)
    monkeypatch.setattr("sim_runtime._extension", None)
    assert probe().reason == (
        "its extension has not been compiled: pip install --no-build-isolation torchport-sim,"
        " with a C++ compiler"
    )


def test_where_no_devices_are_asked_for_its_probe_imports_neither_torch_nor_the_runtime():
    code = (
        "import sys, torchport_sim; probe = torchport_sim.probe()\n"
        "print(probe.available, {'torch', 'sim_runtime'} & set(sys.modules))"
    )
    assert ask(code) == "False set()\n"


def test_its_probe_loads_the_devices_and_so_does_importing_pytorch():
    code = (
        "import sys, torchport_sim; probe = torchport_sim.probe(); import torch\n"
        "print(probe.available, probe.count, torch.ones(1, device='sim:1').device, torch.accelerator.device_count())\n"
        "print(dict(probe.details), torch.sim.get_device_name(1), torch.sim.mem_get_info(1)[1])"
    )
    variables = {"SIM_DEVICE_COUNT": "4", "SIM_VISIBLE_DEVICES": "1,3", "SIM_MEMORY_LIMIT": "1.5MiB"}
    assert ask(code, **variables).splitlines() == [
        "True 2 sim:1 2",
        "{'memory of each': '1572864 bytes'} Simulated device 3 1572864",
    ]


def test_the_plugin_is_small():
    lines = sum(len(path.read_text().splitlines()) for path in SOURCE.glob("src/torchport_sim/*.py"))
    assert lines <= 250


def test_the_readme_names_every_file_and_no_other():
    text = (SOURCE / "README.md").read_text()
    for folder in ("csrc", "src/sim_runtime", "src/torchport_sim"):
        for path in (SOURCE / folder).iterdir():
            if path.suffix in (".cpp", ".h", ".py"):
                assert f"{path.name}`" in text, path.name
