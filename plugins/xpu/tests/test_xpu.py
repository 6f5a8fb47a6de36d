"""The backend `xpu` and its probes, against a stub of `torch.xpu` made from its public documentation."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torchport.plugin import Capabilities, PrepareRequest, Probe, Topology
from torchport.testing.stubs import Call, StubDevice, StubModule, installed
from torchport_xpu import probe, probe_xccl, torchport_backends, torchport_collectives
from torchport_xpu.backend import XcclCollectives, XpuBackend, ipex_fits

TORCH_XPU = (
    "https://docs.pytorch.org/docs/stable/xpu.html",
    "https://docs.pytorch.org/docs/stable/notes/get_start_xpu.html",
)
IPEX = ("https://intel.github.io/intel-extension-for-pytorch/xpu/latest/tutorials/api_doc.html",)
SPEC = next(iter(torchport_backends()))
BUILD = {"__version__": "2.13.0+xpu", "xpu": "20250301"}
RELEASE = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def properties():
    """What the GPUs are like."""
    return [SimpleNamespace(has_fp64=True), SimpleNamespace(has_fp64=True)]


@pytest.fixture
def xpu(monkeypatch, properties):
    """`torch.xpu` on a machine with two GPUs."""
    monkeypatch.setattr("torchport_xpu.torch_build", lambda: BUILD)
    monkeypatch.delenv("ZE_AFFINITY_MASK", raising=False)
    stub = StubDevice(
        "xpu", documentation=TORCH_XPU, count=2, get_device_properties=lambda index: properties[index]
    )
    with installed(stub):
        yield stub


@pytest.fixture
def backend() -> XpuBackend:
    return XpuBackend(SPEC)


@pytest.fixture
def ipex():
    """Intel's extension, of the release for this PyTorch."""
    stub = StubModule("intel_extension_for_pytorch", documentation=IPEX, optimize=None)
    with installed(stub, distributions={"intel-extension-for-pytorch": f"{RELEASE}.10+xpu"}):
        yield stub


def test_the_probe_counts_without_initialising_the_runtime(xpu, monkeypatch):
    assert probe() == Probe(available=True, count=2)
    xpu.count = 0
    no_gpu = "no Intel GPU answers: is there one, and is its driver installed? (xpu-smi discovery)"
    assert probe() == Probe(available=False, reason=no_gpu)
    monkeypatch.setenv("ZE_AFFINITY_MASK", "9")
    assert probe().reason == "no GPU is visible with ZE_AFFINITY_MASK='9': unset it, or name one"
    assert not xpu.initialized


@pytest.mark.usefixtures("xpu")
def test_xccl_is_there_if_pytorch_has_it(monkeypatch):
    monkeypatch.setattr(dist, "is_xccl_available", lambda: True, raising=False)
    assert probe_xccl() == Probe(available=True)
    monkeypatch.delattr(dist, "is_xccl_available")  # PyTorch 2.6
    assert probe_xccl().reason == "PyTorch 2.13.0+xpu has no XCCL: pip install --upgrade torch (2.7)"


HERE = """
import sys
from torchport_xpu import probe, probe_xccl
answers = [probe(), probe_xccl()]
print([answer.available for answer in answers], "torch" in sys.modules, answers[0] == answers[1], answers[0].reason)
"""


@pytest.mark.skipif(bool(getattr(torch.version, "xpu", None)), reason="this PyTorch is built for Intel GPUs")
def test_a_pytorch_not_built_for_them_is_told_how_to_get_one_without_importing_it():
    done = subprocess.run([sys.executable, "-c", HERE], capture_output=True, text=True, check=True)
    said = f"[False, False] False True PyTorch {torch.__version__} is not built for Intel GPUs: pip uninstall torch"
    assert done.stdout.startswith(said)


def test_each_process_makes_the_gpu_of_its_local_rank_the_current_one(xpu, backend):
    device = backend.device(1)
    assert device == torch.device("xpu", 1)
    assert xpu.calls == [Call("set_device", (device,))]


def test_memory_random_numbers_and_streams_are_those_of_torch_xpu(xpu, backend):
    device = torch.device("xpu", 1)
    xpu.occupy(100, device)
    assert backend.memory_info(device) == (xpu.memory - 100, xpu.memory)
    assert (backend.memory_allocated(device), backend.max_memory_allocated(device)) == (100, 100)
    backend.reset_peak_memory(device)
    backend.empty_cache()
    backend.synchronize(device)
    backend.seed(5)
    backend.set_rng_state(backend.rng_state(device), device)
    stream = backend.stream(device)
    with backend.use_stream(stream):
        pass
    names = [call.name for call in xpu.calls if call.name != "get_device_properties"]
    assert names == [
        "mem_get_info", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache",
        "synchronize", "manual_seed_all", "get_rng_state", "set_rng_state", "Stream", "stream",
    ]  # fmt: skip
    assert all(
        call.args[-1] == device for call in xpu.calls if call.name in names[:4] + names[5:6] + names[7:10]
    )


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.usefixtures("xpu")
def test_capabilities_are_those_of_all_gpus(backend, properties, second, monkeypatch):
    properties[1].has_fp64 = second  # in which loss scaling computes
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.capabilities() == Capabilities(
        autocast=frozenset({"float16", "bfloat16"}),
        grad_scaler=second,
        distributed=True,
        pinned_memory=True,
        streams=True,
        memory_stats=True,
    )


@pytest.mark.usefixtures("xpu")
def test_the_process_group_is_xccl_beside_gloo(monkeypatch):
    given, store = [], dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.append((args, kwargs)))
    two, minute = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2), timedelta(minutes=1)
    XcclCollectives(next(iter(torchport_collectives()))).open(two, torch.device("xpu", 1), minute, store)
    place = {"rank": 1, "world_size": 2, "timeout": minute, "device_id": None}
    assert given == [(("cpu:gloo,xpu:xccl",), {"store": store, **place})]


# --- Intel's extension ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fits"),
    [(f"{RELEASE}.10+xpu", True), (f"{RELEASE}.0", False), ("2.1.40+xpu", False), (None, False)],
)
def test_the_extension_fits_the_pytorch_it_was_built_for_and_gpus(version, fits):
    found = {"intel-extension-for-pytorch": version} if version else {}
    with installed(distributions=found):
        assert ipex_fits() is fits


def request(models, optimizers, **more):
    precision = SimpleNamespace(compute_dtype=torch.bfloat16)
    context = SimpleNamespace(precision=precision, device=torch.device("xpu", 0))
    return PrepareRequest(
        models=tuple(models), optimizers=tuple(optimizers), context=context,
        device_placement=(True,) * len(models), **more,
    )  # fmt: skip


def test_it_optimises_a_model_with_its_optimizer_on_the_device_and_in_place(xpu, ipex, backend):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with xpu.on_host():
        backend.adapt(request([model], [optimizer]))
    assert ipex.calls == [
        Call("optimize", (model,), {"optimizer": optimizer, "dtype": torch.bfloat16, "inplace": True})
    ]


def test_it_optimises_models_for_evaluation(xpu, ipex, backend):
    model = torch.nn.Linear(2, 1)
    with xpu.on_host():
        backend.adapt(request([model], [], evaluation_only=True))
    assert ipex.calls == [Call("optimize", (model,), {"dtype": torch.bfloat16, "inplace": True})]
    assert not model.training


def test_several_models_and_releases_that_do_not_fit_are_left_alone(xpu, ipex, backend):
    models = [torch.nn.Linear(2, 1) for _ in range(2)]
    backend.adapt(request(models, []))
    with installed(distributions={"intel-extension-for-pytorch": "2.1.40+xpu"}):
        backend.adapt(request(models[:1], [], evaluation_only=True))
    assert ipex.calls == []
