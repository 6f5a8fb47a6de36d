"""Runs that start afresh, a backend with FP8, and the stub of TransformerEngine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

STUBS = Path(__file__).parent / "stubs"
LAB = """
from torchport.plugin import BackendSpec, Probe, hookimpl

@hookimpl
def torchport_backends():
    yield BackendSpec(
        name="lab", device_type="cpu", factory="torchport_lab:make", probe="torchport_lab:probe", priority=-1
    )

def probe():
    return Probe(available=True, count=1)

def make(spec, config=None):
    import dataclasses
    from torchport_cpu.backend import CpuBackend

    class Lab(CpuBackend):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), features=frozenset(FEATURES))

    return Lab(spec, config)
"""


@pytest.fixture(autouse=True)
def fresh_run():
    """Compute in one thread, and end the run that a test has opened."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torchport.state" in sys.modules:
        sys.modules["torchport.state"].AcceleratorState._reset_state()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Install the backend `lab`: the host's processor, which claims the given features."""

    def install(*features: str) -> None:
        source = LAB.replace("FEATURES", repr(features))
        (tmp_path / "torchport_lab.py").write_text(source)
        info = tmp_path / "torchport_lab-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchport-lab\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[torchport]\nlab = torchport_lab\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("torchport_lab", None)


@pytest.fixture
def te(monkeypatch):
    """Put the stub of TransformerEngine in the place of the library and return its `pytorch` module."""
    monkeypatch.syspath_prepend(STUBS)
    import transformer_engine.pytorch as stub

    stub.CALLS.clear()
    yield stub
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
