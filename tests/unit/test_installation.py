"""What is told of PyTorch without importing it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest
import torch
from torchport.plugin import torch_build


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder where PyTorch seems to be installed."""
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    torch_build.cache_clear()
    yield tmp_path
    torch_build.cache_clear()


def test_it_is_what_pytorch_itself_says():
    said = torch_build()
    assert said["__version__"] == torch.__version__
    names = ("cuda", "hip", "xpu")
    assert {name: said[name] for name in names} == {
        name: getattr(torch.version, name) or "" for name in names
    }


def test_it_reads_plain_values_of_assignments_only(elsewhere):
    (elsewhere / "version.py").write_text(
        "a: Optional[str] = '12.8'\nb = None\nc = f()\nd = 3\n__version__ = '2.9'\n"
    )
    assert torch_build() == {"a": "12.8", "b": "", "__version__": "2.9"}


def test_without_the_file_nothing_is_known(elsewhere):
    assert torch_build() == {}


def test_pytorch_is_not_imported():
    code = (
        "import sys; from torchport.plugin import torch_build; torch_build(); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
