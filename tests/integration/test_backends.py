"""All installed backends together: why each is not available, what is chosen, and how large they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torchport.errors import AmbiguousError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import Probe, Topology
from torchport.testing.stubs import StubDevice, installed

pytestmark = pytest.mark.plugins
WORKER = Path(__file__).parent / "workers" / "all_backends.py"
SIZES = Path(__file__).parents[1] / "support" / "sizes.py"
HOSTS = {"cpu", "sim"}
"""Backends that every machine has."""

WHAT_TO_DO = {
    "cuda": "pip uninstall torch, then pip install torch",
    "hpu": "https://docs.habana.ai/en/latest/Installation_Guide",
    "mps": "macOS on Apple silicon",
    "xpu": "install the XPU build",
}


@pytest.fixture(scope="module")
def found():
    """What one fresh process says of all installed plugins."""
    done = subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def absent(found):
    """The backends whose device is not here, with the reason."""
    return {name: reason for name, (available, reason) in found["probes"].items() if not available}


def test_discovery_and_descriptors_import_neither_torch_nor_a_vendors_package(found):
    assert found["loaded by discovery"] == []
    assert set(found["probes"]) >= {"cpu", *WHAT_TO_DO}
    assert found["failures"] == []


def test_each_backend_that_is_not_available_says_why_and_what_to_do(absent):
    assert all(len(reason) > 20 for reason in absent.values()), absent
    here = absent.keys() & WHAT_TO_DO.keys()
    assert {name: WHAT_TO_DO[name] in absent[name] for name in here} == dict.fromkeys(here, True)


def test_the_reason_of_an_absent_device_costs_no_import_of_torch_or_a_vendors_package(found):
    assert found["loaded by probes"] == {}


def test_doctor_shows_the_same_reasons_and_finds_no_error(absent):
    command = [sys.executable, "-m", "torchport", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    shown = {one["name"]: one["reason"] for one in report["probes"] if one["kind"] == "backend"}
    assert {name: shown[name] for name in absent} == absent
    assert (done.returncode, report["healthy"]) == (0, True)


def test_automatic_selection_takes_what_is_there_and_lists_the_reasons_of_the_rest(found, absent):
    if set(found["probes"]) - set(absent) <= HOSTS:
        assert found["chosen"] == "cpu"
    assert absent.items() <= dict(found["rejected"]).items()


def test_asking_for_a_backend_that_is_not_available_fails_with_its_reason(found, absent):
    for name, reason in absent.items():
        assert found["asked"][name] == {
            "problem": f"TORCHPORT_BACKEND asks for the backend {name!r}, which is installed but unusable here",
            "reason": reason,
            "hint": "torchport doctor, or another backend: torchport plugins --kind backend",
        }


def test_a_second_vendors_device_type_is_refused_in_one_process(found):
    refused = found["second vendor"]
    assert refused["problem"] == (
        "backend 'second' needs PyTorch's one place for device types of other vendors (PrivateUse1)"
    )
    taken = f"another vendor's package has taken it in this process, for {found['first vendor']!r}"
    assert refused["found"] == taken
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in refused["hint"]


# --- several devices in one machine -------------------------------------------------------------------------


@pytest.fixture
def two_vendors(monkeypatch):
    """A machine with an NVIDIA and an Intel GPU."""
    pages = (
        "https://docs.pytorch.org/docs/stable/cuda.html",
        "https://docs.pytorch.org/docs/stable/xpu.html",
    )
    there = Probe(available=True, count=1)
    for module in ("torchport_cuda.probe", "torchport_xpu"):
        monkeypatch.setattr(importlib.import_module(module), "probe", lambda: there)
    with installed(StubDevice("cuda", documentation=pages), StubDevice("xpu", documentation=pages)):
        yield


@pytest.mark.usefixtures("two_vendors")
def test_two_available_devices_of_equal_priority_are_an_error_that_names_the_variable():
    with pytest.raises(AmbiguousError) as refused:
        plan(Request(), {}, discover({}), Topology())
    assert "'cuda' and 'xpu' are equally good (priority 100)" in refused.value.problem
    assert refused.value.hint == "say which: export TORCHPORT_BACKEND=cuda"
    assert plan(Request(), {"TORCHPORT_BACKEND": "xpu"}, discover({}), Topology()).backend == "xpu"


MASK = """
from torchport.plugin import BackendSpec, Probe, hookimpl

@hookimpl
def torchport_backends():
    yield BackendSpec(
        name="mask", device_type="cuda", priority=110, factory="torchport_mask:make", probe="torchport_mask:probe"
    )

def probe():
    return Probe(available=True, count=1)
"""


@pytest.mark.usefixtures("two_vendors")
def test_a_backend_that_masquerades_as_anothers_device_wins_by_its_priority(site):
    site.install("torchport-mask", MASK)
    made = plan(Request(), {}, discover({}), Topology())
    assert (made.backend, made["backend"].spec.device_type) == ("mask", "cuda")
    lower = {rejected.name: rejected.reason for rejected in made["backend"].rejected}
    assert {name: lower[name] for name in ("cpu", "cuda", "xpu")} == {
        "cpu": "lower priority (0 < 110)",
        "cuda": "lower priority (100 < 110)",
        "xpu": "lower priority (100 < 110)",
    }
    assert plan(Request(), {"TORCHPORT_BACKEND": "cuda"}, discover({}), Topology()).backend == "cuda"


# --- sizes ---------------------------------------------------------------------------------------------------


OFFERS = """
@hookimpl
def torchport_collectives():
    yield 1


def torchport_backends():
    yield 2
"""


def test_no_backend_needs_more_than_250_lines_of_python():
    spec = importlib.util.spec_from_file_location("sizes", SIZES)
    sizes = importlib.util.module_from_spec(spec)
    sys.modules["sizes"] = sizes
    try:
        spec.loader.exec_module(sizes)
        assert sizes.code_lines('"""Doc."""\n\n# why\nx = 1  # one\n\ny = """\ntwo\n"""\n') == 4
        assert sizes.code_lines(OFFERS) == 2
        assert {size.name: size.code for size in sizes.sizes() if size.code > sizes.LIMIT} == {}
        modules = {size.name: size.modules for size in sizes.sizes()}
        assert modules["xpu"] == ("torchport_xpu", "torchport_xpu.backend")
    finally:
        del sys.modules["sizes"]
