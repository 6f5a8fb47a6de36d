"""Stubs of NVIDIA's management library and of `torch.cuda`, made from their public documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torchport.plugin import BackendSpec
from torchport.testing.stubs import StubDevice, StubModule, installed
from torchport_cuda import torchport_backends
from torchport_cuda.backend import CudaBackend

TORCH_CUDA = (
    "https://docs.pytorch.org/docs/stable/cuda.html",
    "https://docs.pytorch.org/docs/stable/notes/cuda.html",
    "https://docs.pytorch.org/docs/stable/notes/hip.html",
)
NVML = (
    "https://pypi.org/project/nvidia-ml-py/",
    "https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html",
    "https://docs.nvidia.com/datacenter/tesla/mig-user-guide/#cuda-visible-devices",
)
SPEC: BackendSpec = next(iter(torchport_backends()))
BUILD = {"__version__": "2.13.0", "cuda": "12.8", "hip": ""}


@dataclass
class Card:
    """A GPU as NVML shows it."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    affinity: tuple[int, ...] = (0b11,)
    instances: list[str] = field(default_factory=list)


class NVMLError(Exception):
    """The library's error."""


def stub_nvml(cards: list[Card] | None) -> StubModule:
    """A machine with these GPUs; `None`: without a driver."""

    def init():
        if cards is None:
            raise NVMLError("NVML Shared Library Not Found")

    def by_uuid(uuid):
        for card in cards:
            if uuid in card.instances:
                return SimpleNamespace(uuid=uuid, whole=card)
        raise NVMLError("Not Found")

    return StubModule(
        "pynvml",
        documentation=NVML,
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: cards[index],
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda handle: handle.uuid,
        nvmlDeviceGetName=lambda handle: handle.name,
        nvmlDeviceGetCudaComputeCapability=lambda handle: handle.capability,
        nvmlDeviceGetCpuAffinity=lambda handle, words: list(handle.affinity),
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: handle.whole,
    )


@pytest.fixture
def nvml(monkeypatch):
    """Call it with the GPUs of the machine."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stubs = []

    def machine(*cards: Card, driver: bool = True) -> StubModule:
        stub = stub_nvml(list(cards) if driver else None)
        context = installed(stub)
        context.__enter__()
        stubs.append(context)
        return stub

    yield machine
    for context in reversed(stubs):
        context.__exit__(None, None, None)


@pytest.fixture
def no_nvml(monkeypatch):
    """A machine without nvidia-ml-py."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)


@pytest.fixture
def cuda(monkeypatch):
    """`torch.cuda` of a PyTorch that was built with CUDA, on a machine with two GPUs."""
    monkeypatch.setattr("torchport_cuda.probe.torch_build", lambda: BUILD)
    monkeypatch.setattr("torchport_cuda.probe._has_driver", lambda: True)
    # The probe sets it; the test must leave it as it was.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    stub = StubDevice(
        "cuda", documentation=TORCH_CUDA, count=2, get_device_capability=lambda device=None: (8, 6)
    )
    with installed(stub):
        yield stub


@pytest.fixture
def rocm(cuda, monkeypatch):
    """The same, built with ROCm: PyTorch gives it the same name."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr("torchport_cuda.probe.torch_build", lambda: {**BUILD, "cuda": "", "hip": "6.4"})
    return cuda


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend(SPEC)
