"""Broken plugins, all installed at once: each is explained, none takes the program down."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TRACKER = """
    from torchport.plugin import TrackerSpec, hookimpl

    @hookimpl
    def torchport_trackers():
        yield TrackerSpec(name="{name}", factory="torchport_{module}:Tracker")
"""

BROKEN = {
    "import": "import a_vendor_that_is_not_there",
    "raising": """
    from torchport.plugin import hookimpl

    @hookimpl
    def torchport_backends():
        raise RuntimeError("the vendor's daemon hung up")
""",
    "misspelt": """
    from torchport.plugin import hookimpl

    @hookimpl
    def torchport_backend():
        return []
""",
    "invalid": """
    from torchport.plugin import BackendSpec, hookimpl

    @hookimpl
    def torchport_backends():
        yield BackendSpec(name="invalid", factory="no reference", probe="m:p", device_type="cpu")
""",
    "unmet": """
    from torchport.plugin import BackendSpec, hookimpl

    @hookimpl
    def torchport_backends():
        yield BackendSpec(
            name="unmet", factory="never_imported:B", probe="never_imported:p", device_type="cpu",
            runtime=("a-vendor-runtime>=2.4",),
        )
""",
    "twin-one": TRACKER.format(name="twin", module="twin_one"),
    "twin-two": TRACKER.format(name="twin", module="twin_two"),
}
"""By entry-point name; a duplicate takes two."""

REASONS = {
    "import": "import failed: ModuleNotFoundError: No module named 'a_vendor_that_is_not_there'",
    "raising": "RuntimeError: the vendor's daemon hung up",
    "misspelt": "there is no hook 'torchport_backend'",
    "invalid": "factory must be of the form 'module:Name'",
    "unmet": "needs a-vendor-runtime>=2.4, which is not installed",
    "twin": "offered by torchport-twin-one 1.0 and by torchport-twin-two 1.0",
}

SCRIPT = """
import torch
from torchport import Accelerator
accelerator = Accelerator()
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
losses = []
for _ in range(5):
    loss = model(torch.ones(4, 2)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(accelerator.plan.backend, losses[-1] < losses[0])
"""


@pytest.fixture
def broken(site):
    for name, source in BROKEN.items():
        site.install(f"torchport-{name}", source)
    return site


def run(*command: str, code: int, **variables: str) -> subprocess.CompletedProcess:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHPORT_")}
    done = subprocess.run(
        [sys.executable, *command],
        env=environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_doctor_lists_each_with_its_reason(broken):
    lines = run("-m", "torchport", "doctor", code=1).stdout.splitlines()
    for name, reason in REASONS.items():
        assert any(name in line and reason in line for line in lines), name
    told = json.loads(run("-m", "torchport", "doctor", "--json", code=1).stdout)
    assert [failure["plugin"]["name"] for failure in told["failures"]] == [
        "import",
        "invalid",
        "misspelt",
        "raising",
    ]
    assert sum(finding["level"] == "error" for finding in told["findings"]) == 5
    unavailable = {probe["name"] for probe in told["probes"] if not probe["available"]}
    assert "unmet" in unavailable


def test_a_script_trains_all_the_same_and_hears_of_them_once(broken):
    done = run("-c", SCRIPT, code=0)
    assert done.stdout.split() == ["cpu", "True"]
    for name in ("import", "invalid", "misspelt", "raising"):
        assert done.stderr.count(f"while plugin {name!r} (torchport-{name} 1.0) could not be registered") == 1


def test_a_script_that_says_what_it_wants_hears_nothing(broken):
    assert run("-c", SCRIPT, code=0, TORCHPORT_BACKEND="cpu").stderr == ""


@pytest.mark.parametrize(
    ("name", "slot", "reason"),
    [
        ("import", "BACKEND", REASONS["import"]),
        ("raising", "BACKEND", REASONS["raising"]),
        ("misspelt", "BACKEND", REASONS["misspelt"]),
        ("invalid", "BACKEND", REASONS["invalid"]),
        ("unmet", "BACKEND", REASONS["unmet"]),
        ("twin", "TRACKERS", "torchport-twin-one 1.0 and torchport-twin-two 1.0"),
    ],
)
def test_asking_for_one_of_them_by_name_fails_with_its_reason(broken, name, slot, reason):
    done = run("-m", "torchport", "plan", code=2, **{f"TORCHPORT_{slot}": name})
    assert f"TORCHPORT_{slot} asks for the {slot.lower().rstrip('s')} {name!r}" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_switching_them_off_makes_the_installation_healthy(broken):
    done = run("-m", "torchport", "doctor", code=0, TORCHPORT_DISABLE_PLUGINS=",".join(BROKEN))
    assert done.stdout.rstrip().endswith("no errors found")
