"""The plugin as a package, and its backend against a stub of `torch.mlu` made from the vendor's documentation."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchport_mlu
from torchport.errors import LaunchError
from torchport.plan.discovery import discover
from torchport.plugin import Probe, Topology
from torchport.testing import BackendConformance, PackageConformance
from torchport.testing.stubs import StubDevice, StubModule, installed

PAGES = ("https://github.com/Cambricon/torch_mlu",)
VISIBLE = "MLU_VISIBLE_DEVICES"


class TestPackage(PackageConformance):
    plugin = "mlu"
    heavy_modules = ("torch_mlu",)


class TestBackend(BackendConformance):
    backend = "mlu"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = ("torch_mlu",)


@pytest.fixture
def device(monkeypatch):
    """`torch.mlu` on a machine with two devices."""
    monkeypatch.delenv(VISIBLE, raising=False)
    stub = StubDevice("mlu", documentation=PAGES, count=2)
    package = StubModule("torch_mlu", documentation=PAGES)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: stub)
    with installed(stub, package, distributions={"torch-mlu": "2.13.0"}):
        yield stub


@pytest.fixture
def backend(device):
    from torchport_mlu.backend import MluBackend

    return MluBackend(next(iter(torchport_mlu.torchport_backends())))


def test_without_the_vendors_package_the_reason_says_what_to_install():
    found = discover({"TORCHPORT_PLUGINS": "mlu"})
    (spec,) = found.specs("backend")
    assert "pip install 'torch-mlu'" in found.probe(spec).reason


def test_the_probe_counts_without_initialising_and_says_why_there_is_none(device, monkeypatch):
    assert torchport_mlu.probe() == Probe(available=True, count=2)
    device.count = 0
    assert "(cnmon)" in torchport_mlu.probe().reason
    monkeypatch.setenv(VISIBLE, "9")
    assert torchport_mlu.probe().reason == f"no device is visible with {VISIBLE}='9': unset it, or name one"
    assert not device.initialized
    monkeypatch.setitem(sys.modules, "torch_mlu", None)
    assert torchport_mlu.probe().reason.startswith("torch_mlu cannot be loaded: ")


def test_each_process_takes_the_device_of_its_local_rank(device, backend, monkeypatch):
    monkeypatch.setattr(torch, "device", lambda kind, index: SimpleNamespace(type=kind, index=index))
    monkeypatch.setattr(device, "set_device", lambda one: setattr(device, "current", one.index))
    assert (backend.device(1).index, device.current) == (1, 1)
    with pytest.raises(LaunchError, match="local rank 2 has no device of its own"):
        backend.device(2)


def test_memory_and_random_numbers_are_those_of_the_vendors_module(device, backend):
    device.occupy(100, 1)
    assert backend.memory_info(1) == (device.memory - 100, device.memory)
    assert backend.max_memory_allocated(1) == 100
    backend.seed(5)
    state = backend.rng_state(0)
    backend.set_rng_state(state, 0)
    assert device.arguments("manual_seed_all") == [(5,)]
    assert torch.equal(device.arguments("set_rng_state")[0][0], state)


@pytest.mark.parametrize(("supported", "dtypes"), [(True, {"float16", "bfloat16"}), (False, {"float16"})])
def test_bf16_is_declared_where_the_module_says_so(device, backend, monkeypatch, supported, dtypes):
    monkeypatch.setattr(device, "is_bf16_supported", lambda: supported)
    assert backend.capabilities().autocast == dtypes


def test_tensors_go_over_cncl_and_objects_over_gloo(device, monkeypatch):
    from torchport_mlu.backend import CnclCollectives

    opened = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **kw: opened.append((backend, kw["rank"]))
    )
    spec = next(iter(torchport_mlu.torchport_collectives()))
    CnclCollectives(spec).open(
        Topology(), SimpleNamespace(type="mlu"), timedelta(seconds=1), dist.HashStore()
    )
    assert opened == [("cpu:gloo,mlu:cncl", 0)]
