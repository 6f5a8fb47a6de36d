"""All levels on real GPUs, where there are some; without any, the package level alone."""

from __future__ import annotations

import pytest
import torch
from torchport.testing import BackendConformance, CollectivesConformance

THERE = torch.cuda.is_available()
GPUS = torch.cuda.device_count()


class TestBackend(BackendConformance):
    backend = "cuda"
    levels = () if THERE else ("L0",)
    verified_on = "hardware" if THERE else "stub"
    heavy_modules = ("pynvml",)


class TestCollectives(CollectivesConformance):
    collectives = "nccl"
    backend = "cuda"
    processes = 2
    levels = () if GPUS > 1 else ("L0",)
    verified_on = "hardware" if GPUS > 1 else "stub"


@pytest.mark.skipif(not THERE, reason="no GPU is visible")
def test_a_step_can_be_captured_in_a_cuda_graph():
    from torchport import Accelerator

    accelerator = Accelerator(backend="cuda")
    model = torch.nn.Linear(8, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = torch.ones(4, 8, device=accelerator.device)

    def step() -> None:
        accelerator.backward(model(inputs).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = model.weight.detach().clone()
    graph.replay()
    assert not torch.equal(before, model.weight)
    accelerator.end_training()
