"""What the probes answer: how many GPUs a process sees, or why none, without initialising CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torchport.plugin import Probe
from torchport_cuda.gpus import visible_gpus
from torchport_cuda.probe import probe, probe_nccl

from .conftest import Card

A, B, C = (
    Card("GPU-aaaa-1"),
    Card("GPU-aabb-2", instances=["MIG-1", "MIG-2"]),
    Card("GPU-cccc-3", "NVIDIA L4"),
)
ALL = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, ["A", "B", "C"]),
        ("", []),
        ("-1", []),
        ("2,0", ["C", "A"]),
        (" 1 , 2 ", ["B", "C"]),
        ("0,7,1", ["A"]),  # what names no GPU ends the list
        ("1,1", []),  # what is named twice empties it
        ("GPU-cccc-3,GPU-aaaa-1", ["C", "A"]),
        ("GPU-c", ["C"]),  # the beginning of a UUID that only one has
        ("GPU-aa", []),
        ("GPU-zzzz", []),
        ("MIG-2,MIG-1", ["B", "B"]),  # two instances of one GPU
        ("MIG-9", []),
    ],
)
def test_gpus_are_counted_and_ordered_as_the_variable_says(cuda, nvml, monkeypatch, variable, seen):
    cards = {"A": Card("GPU-aaaa-1", "A"), "B": Card("GPU-aabb-2", "B", instances=["MIG-1", "MIG-2"])}
    cards["C"] = Card("GPU-cccc-3", "C")
    stub = nvml(*cards.values())
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.name for gpu in visible_gpus()] == seen
    assert [call.name for call in stub.calls].count("nvmlShutdown") == 1
    answer = probe()
    assert (answer.available, answer.count) == (bool(seen), len(seen))
    assert answer.details == ({"devices": ", ".join(sorted(set(seen)))} if seen else {})
    if not seen:
        assert (
            answer.reason
            == f"no GPU is visible with CUDA_VISIBLE_DEVICES={variable!r}: unset it, or name one"
        )
    assert (cuda.initialized, cuda.calls) == (False, [])


@pytest.mark.usefixtures("no_nvml")
def test_without_nvml_pytorch_counts(cuda):
    assert probe() == Probe(available=True, count=2)
    assert not cuda.initialized


@pytest.mark.usefixtures("no_nvml")
def test_without_nvml_and_a_driver_pytorch_is_not_even_asked(cuda, monkeypatch):
    monkeypatch.setattr("torchport_cuda.probe._has_driver", lambda: False)
    assert "no NVIDIA GPU answers" in probe().reason


def test_a_machine_without_a_driver_is_told_where_to_look(cuda, nvml):
    cuda.count = 0
    nvml(driver=False)
    reason = "no NVIDIA GPU answers: is there one, and is its driver loaded? (nvidia-smi)"
    assert probe() == Probe(available=False, reason=reason)


def test_rocm_is_counted_by_pytorch_and_has_its_own_tool(rocm, nvml):
    nvml(Card("GPU-1"))  # is not asked
    assert probe() == Probe(available=True, count=2)
    rocm.count = 0
    assert probe().reason == "no AMD GPU answers: is there one, and is its driver loaded? (rocm-smi)"


def test_variables_of_rocm_that_hide_all_gpus_are_named(rocm, monkeypatch):
    rocm.count = 0
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")
    shown = "HIP_VISIBLE_DEVICES='-1' ROCR_VISIBLE_DEVICES='0'"
    assert probe().reason == f"no GPU is visible with {shown}: unset it, or name one"


def test_nccl_is_there_if_pytorch_has_it(cuda, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert probe_nccl() == Probe(available=True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "Linux only" in probe_nccl().reason


HERE = """
import os, sys
from torchport_cuda.probe import probe, probe_nccl
answers = [probe(), probe_nccl()]
print([answer.available for answer in answers], "torch" in sys.modules, "PYTORCH_NVML_BASED_CUDA_CHECK" in os.environ)
print(answers[0].reason == answers[1].reason, answers[0].reason)
"""


@pytest.mark.skipif(
    bool(torch.version.cuda or torch.version.hip), reason="this PyTorch is built with CUDA or ROCm"
)
def test_a_pytorch_built_without_cuda_is_told_how_to_get_one_without_importing_it():
    done = subprocess.run([sys.executable, "-c", HERE], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "[False, False] False False"
    assert second.startswith(
        f"True PyTorch {torch.__version__} is built for neither CUDA nor ROCm: pip uninstall torch"
    )
