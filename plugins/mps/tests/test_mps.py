"""The backend `mps` and its probe, against a stub of `torch.mps` made from its public documentation."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torchport.errors import ConfigurationError, IncompatibleError, UnsupportedOperationError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import Capabilities, Probe, Topology
from torchport.testing.stubs import Call, StubDevice, StubModule, installed
from torchport_mps import probe, torchport_backends
from torchport_mps.backend import MpsBackend
from torchport_mps.config import FALLBACK, MpsSettings

TORCH_MPS = (
    "https://docs.pytorch.org/docs/stable/mps.html",
    "https://docs.pytorch.org/docs/stable/notes/mps.html",
    "https://docs.pytorch.org/docs/stable/mps_environment_variables.html",
)
SPEC = next(iter(torchport_backends()))
MPS = torch.device("mps", 0)
NOT_THERE = (
    "set_device", "current_device", "mem_get_info", "memory_allocated", "max_memory_allocated",
    "memory_reserved", "reset_peak_memory_stats", "manual_seed_all", "get_device_name", "get_device_properties",
    "get_device_capability", "is_bf16_supported", "is_initialized", "init", "Stream", "stream", "set_stream",
    "current_stream", "default_stream", "initial_seed",
)  # fmt: skip


class Mac:
    """A Mac, as `platform`, `torch.mps` and `torch.backends.mps` show it."""

    def __init__(self) -> None:
        self.system, self.machine, self.macos, self.built, self.available = (
            "Darwin",
            "arm64",
            (15, 2),
            True,
            True,
        )
        self.device = StubDevice(
            "mps",
            documentation=TORCH_MPS,
            without=NOT_THERE,
            current_allocated_memory=lambda: 300,
            driver_allocated_memory=lambda: 400,
            recommended_max_memory=lambda: 1000,
            synchronize=lambda: None,
        )
        self.backends = StubModule(
            "torch.backends.mps",
            documentation=TORCH_MPS,
            is_built=lambda: self.built,
            is_available=lambda: self.available,
            is_macos_or_newer=lambda major, minor: self.macos >= (major, minor),
        )


@pytest.fixture
def mac(monkeypatch):
    made = Mac()
    monkeypatch.setattr(platform, "system", lambda: made.system)
    monkeypatch.setattr(platform, "machine", lambda: made.machine)
    monkeypatch.setattr(
        platform, "mac_ver", lambda: (".".join(map(str, made.macos)), ("", "", ""), made.machine)
    )
    with installed(made.device, made.backends):
        yield made


@pytest.fixture
def backend() -> MpsBackend:
    return MpsBackend(SPEC)


def test_a_mac_with_a_gpu_has_one_device(mac, backend):
    assert probe() == Probe(available=True, count=1)
    assert [backend.device(rank) for rank in (0, 3)] == [MPS, MPS]
    assert backend.count() == 1
    assert mac.device.calls == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"system": "Linux", "machine": "x86_64"},
            "Apple GPUs need macOS on Apple silicon; this is Linux on x86_64",
        ),
        ({"machine": "x86_64"}, "Apple GPUs need macOS on Apple silicon; this is Darwin on x86_64"),
        ({"built": False}, "is built without MPS: pip install --force-reinstall torch"),
        (
            {"available": False, "macos": (12, 6)},
            "MPS needs macOS 14 or newer for this PyTorch; this is 12.6",
        ),
    ],
)
def test_the_reason_says_what_is_missing(mac, change, reason):
    vars(mac).update(change)
    answer = probe()
    assert not answer.available
    assert reason in answer.reason


def test_elsewhere_the_probe_does_not_import_torch():
    code = "import sys; from torchport_mps import probe; print(probe().available, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ("True True\n" if torch.backends.mps.is_available() else "False False\n")


@pytest.mark.parametrize(
    ("macos", "release", "autocast", "scaler"),
    [
        ((13, 6), "2.6.0", {"float16"}, False),
        ((14, 0), "2.6.0", {"float16", "bfloat16"}, False),
        ((13, 6), "2.8.0", {"float16"}, True),
        ((15, 2), "2.13.0", {"float16", "bfloat16"}, True),
    ],
)
def test_number_formats_follow_from_macos_and_loss_scaling_from_pytorch(
    mac, backend, monkeypatch, macos, release, autocast, scaler
):
    mac.macos = macos
    monkeypatch.setattr(torch, "__version__", release)
    assert backend.capabilities() == Capabilities(
        autocast=frozenset(autocast), grad_scaler=scaler, distributed=False, memory_stats=True
    )


def test_memory_is_what_the_system_recommends_and_the_driver_holds(mac, backend):
    assert backend.memory_info(MPS) == (600, 1000)
    assert backend.memory_allocated(MPS) == 300
    for peak in (backend.max_memory_allocated, backend.reset_peak_memory):
        with pytest.raises(UnsupportedOperationError, match=r"torch\.mps keeps no such figure"):
            peak(MPS)
    assert [call.name for call in mac.device.calls] == [
        "recommended_max_memory", "driver_allocated_memory", "current_allocated_memory",
    ]  # fmt: skip


def test_random_numbers_and_waiting_use_the_one_device(mac, backend):
    backend.seed(5)
    state = backend.rng_state(MPS)
    backend.set_rng_state(state, MPS)
    backend.synchronize(MPS)
    backend.empty_cache()
    assert backend.stream(MPS) is None
    assert [call.name for call in mac.device.calls] == [
        "manual_seed", "get_rng_state", "set_rng_state", "synchronize", "empty_cache",
    ]  # fmt: skip
    assert mac.device.calls[3] == Call("synchronize")


@pytest.mark.usefixtures("mac")
def test_several_processes_are_refused_with_the_reason():
    request = Request(arguments={"backend": "mps"})
    assert plan(request, {}, discover({}), Topology()).strategy == "single"
    with pytest.raises(IncompatibleError) as refused:
        plan(request, {}, discover({}), Topology(world_size=2, local_world_size=2))
    assert "a job of 2 processes on the backend 'mps'" in refused.value.problem
    assert (
        refused.value.reason == "a Mac has one Apple GPU, and no collectives (gloo, nccl) carry its tensors"
    )


def test_the_fallback_must_be_asked_for_before_pytorch_is_imported(mac, monkeypatch):
    monkeypatch.setenv(FALLBACK, "1")
    assert MpsBackend(SPEC, MpsSettings(fallback="1")).device(0) == MPS
    assert MpsBackend(SPEC, MpsSettings()).device(0) == MPS
    monkeypatch.delenv(FALLBACK)
    with pytest.raises(ConfigurationError, match="torchport launch --mps-fallback 1"):
        MpsBackend(SPEC, MpsSettings(fallback="1")).device(0)
    assert MpsBackend(SPEC, MpsSettings(fallback="0")).device(0) == MPS
