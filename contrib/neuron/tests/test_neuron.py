"""The plugin as a package, and its backend against stubs of torch_xla and torch_neuronx from their documentation."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torchport_neuron
from torchport.plan.discovery import discover
from torchport.plugin import Probe, Topology
from torchport.testing import BackendConformance, PackageConformance
from torchport.testing.stubs import StubModule, installed

AWS = (
    "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/torch-neuronx/programming-guide/"
    "training/pytorch-neuron-programming-guide.html",
)
XLA = ("https://docs.pytorch.org/xla/release/r2.9/index.html",)
HEAVY = ("torch_neuronx", "torch_xla")


class TestPackage(PackageConformance):
    plugin = "neuron"
    heavy_modules = HEAVY


class TestBackend(BackendConformance):
    backend = "neuron"
    levels = ("L0",)
    verified_on = "stub"
    heavy_modules = HEAVY


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A machine with two Neuron devices."""
    for name in ("PJRT_DEVICE", "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torchport_neuron, "DEVICES", str(tmp_path))
    for name in ("neuron0", "neuron1", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_without_the_vendors_package_the_reason_says_what_to_install():
    found = discover({"TORCHPORT_PLUGINS": "neuron"})
    (spec,) = found.specs("backend")
    assert "pip install 'torch-neuronx'" in found.probe(spec).reason


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 2),
        ({"NEURON_RT_NUM_CORES": "4"}, 4),
        ({"NEURON_RT_VISIBLE_CORES": "0-3"}, 4),
        ({"NEURON_RT_VISIBLE_CORES": "0,2,4-5"}, 4),
    ],
)
def test_cores_are_those_that_the_variables_name(dev, monkeypatch, variables, count):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert torchport_neuron.probe() == Probe(available=True, count=count, details={"devices": "2"})


def test_the_probe_says_why_there_is_none(dev, monkeypatch):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "all")
    assert torchport_neuron.probe().reason == "NEURON_RT_VISIBLE_CORES='all': write 0,1 or 0-3"
    for name in ("neuron0", "neuron1"):
        (dev / name).unlink()
    assert "(neuron-ls)" in torchport_neuron.probe().reason
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert torchport_neuron.probe().reason == "PJRT_DEVICE=CPU names another device: unset it"


@pytest.fixture
def backend(dev, monkeypatch):
    """The backend over stubs, and the module of torch_xla's whole-graph functions."""
    state = {"seed": 1}
    package = StubModule(
        "torch_xla", documentation=XLA, sync=None, device=lambda: torch.device("cpu"), __path__=[]
    )
    model = StubModule(
        "torch_xla.core.xla_model",
        documentation=XLA,
        get_rng_state=lambda device=None: state["seed"],
        set_rng_state=lambda seed, device=None: state.update(seed=seed),
        unlazy=None,
        wait_device_ops=None,
    )
    core = StubModule("torch_xla.core", documentation=XLA, xla_model=model, __path__=[])
    runtime = StubModule(
        "torch_xla.runtime",
        documentation=XLA,
        addressable_runtime_device_count=lambda: 2,
        is_spmd=lambda: False,
    )
    neuron = StubModule("torch_neuronx", documentation=AWS)
    swap = torch.__future__.get_swap_module_params_on_conversion()
    modules = [name for name in sys.modules if name in ("torchport_tpu.backend", "torchport_neuron.backend")]
    assert modules == []
    with installed(
        package, core, model, runtime, neuron, distributions={"torch-neuronx": "2.9.0", "torch-xla": "2.9.0"}
    ):
        from torchport_neuron.backend import NeuronBackend

        yield NeuronBackend(next(iter(torchport_neuron.torchport_backends()))), package
        for name in ("torchport_tpu.backend", "torchport_neuron.backend"):
            del sys.modules[name]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    os.environ.pop("PJRT_DEVICE", None)


def test_steps_end_and_random_states_are_those_of_torch_xla(backend, tmp_path):
    neuron, package = backend
    neuron.start_process(Topology())
    assert os.environ["PJRT_DEVICE"] == "NEURON"
    assert (neuron.device(0), neuron.count()) == (torch.device("cpu"), 2)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    neuron.optimizer_step(torch.optim.SGD([weight], lr=0.5))
    assert weight.tolist() == [0.5, 0.5]
    neuron.step_boundary()
    assert [call.name for call in package.calls] == ["device", "sync", "sync"]
    neuron.seed(7)
    state = neuron.rng_state(torch.device("cpu"))
    neuron.seed(8)
    neuron.set_rng_state(state, torch.device("cpu"))
    assert int.from_bytes(bytes(neuron.rng_state(torch.device("cpu")).tolist()), "little") == 7
    neuron.save({"pair": (torch.ones(2), 3)}, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["pair"][1] == 3


def test_several_processes_and_spmd_are_declared(backend):
    declared = backend[0].capabilities()
    assert (declared.distributed, declared.features, declared.autocast) == (
        True,
        frozenset({"spmd"}),
        frozenset({"bfloat16"}),
    )
    assert backend[0].compile_backend() == "openxla"
