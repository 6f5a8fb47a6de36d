"""What otherwise needs several accelerators: placement, memory, random states, sharded training, faults."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from jobs import checks_of

WORKERS = Path(__file__).parent / "workers"

ACME = """
from torchport.plugin import BackendSpec, Probe, hookimpl


@hookimpl
def torchport_backends():
    yield BackendSpec(
        name="acme", factory="torchport_acme:Acme", probe="torchport_acme:probe", device_type="acme", summary="Acme"
    )


def probe():
    import torch
    from torch.utils import backend_registration

    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        return Probe(available=False, reason=f"the place for devices from outside is taken by {taken!r}")
    backend_registration.rename_privateuse1_backend("acme")
    return Probe(available=True, count=1)
"""
"""The plugin of another vendor whose devices are not built into PyTorch."""


@pytest.fixture(scope="session")
def one(run):
    """The outcomes of the checks that one process makes on four devices of 64 MiB each."""
    (outcomes,) = run("one.py", SIM_MEMORY_LIMIT="64MiB").ranks
    return outcomes


@pytest.fixture(scope="session")
def four(run):
    """The outcomes of the checks of four processes, for each."""
    return run("four.py", processes=4).ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("check", checks_of(WORKERS / "one.py"))
def test_on_four_devices_of_one_process(one, check):
    assert one[check] == "passed", one[check]


@pytest.mark.multiprocess
@pytest.mark.parametrize("check", checks_of(WORKERS / "four.py"))
def test_with_four_processes(four, check):
    outcomes = [rank.get(check, "not reached") for rank in four]
    assert outcomes == ["passed"] * 4, "\n".join(outcomes)


@pytest.mark.multiprocess
def test_killing_one_of_four_processes_ends_the_job(run):
    began = time.monotonic()
    job = run("killed.py", processes=4, code=137)
    assert "rank 2 failed first, killed by SIGKILL" in job.output
    assert "the other 3 ranks were stopped" in job.output
    assert time.monotonic() - began < 60


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            "acme",
            "sim",
            "the device type 'acme' has taken PyTorch's one place for devices from outside (PrivateUse1):"
            " only one of the two can be used in a process",
        ),
        ("sim", "acme", "the place for devices from outside is taken by 'sim'"),
    ],
)
def test_of_two_vendors_from_outside_of_pytorch_the_second_is_refused(run, tmp_path, first, second, reason):
    (tmp_path / "torchport_acme.py").write_text(ACME)
    info = tmp_path / "torchport_acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchport-acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchport]\nacme = torchport_acme\n")
    (answer,) = run("clash.py", str(tmp_path), first, second).ranks
    assert answer["available"] == [True, False]
    assert answer["reason"] == reason
    assert reason in answer["refused"]
