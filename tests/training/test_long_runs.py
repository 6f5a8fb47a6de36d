"""Thousands of steps, and run after run in one process, leave nothing behind."""

import gc
import itertools
import threading
import tracemalloc

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, DataLoaderConfiguration
from torchport.state import AcceleratorState, GradientState, PartialState

STEPS = 5000
EPOCH = 100


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def held() -> tuple[int, int, int]:
    """File descriptors, threads of the process, and threads of Python."""
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), threading.active_count()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours() -> int:
    """Bytes traced to lines outside of PyTorch, whose profiler hooks keep a few bytes now and then."""
    gc.collect()
    others = [tracemalloc.Filter(False, "*/torch/*"), tracemalloc.Filter(False, "*/tracemalloc.py")]
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(others).traces)


def test_five_thousand_steps_leave_no_growth_in_memory_descriptors_or_threads(tmp_path, one_thread):
    accelerator = Accelerator(gradient_accumulation_steps=2, log_with="jsonl", project_dir=str(tmp_path))
    accelerator.init_trackers("long")
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    loader = DataLoader(TensorDataset(torch.randn(EPOCH * 2, 8)), batch_size=2, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    def epoch() -> None:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.gather_for_metrics(loss)
        accelerator.reduce(loss)
        accelerator.log({"loss": loss.item()}, step=1)
        accelerator.check_trigger()

    for _ in range(5):  # caches fill
        epoch()
    gc.collect()
    before, resident = held(), psutil.Process().memory_info().rss
    for _ in range(STEPS // EPOCH - 4):
        epoch()
    grown = psutil.Process().memory_info().rss - resident
    assert grown < 4 << 20, f"{grown / 1e6:.1f} MB"
    traced = []
    tracemalloc.start()
    try:
        for _ in range(6):
            epoch()
            traced.append(ours())
    finally:
        tracemalloc.stop()
    growth = [after - earlier for earlier, after in itertools.pairwise(traced)]
    assert min(growth) < 16 * EPOCH, (
        growth
    )  # bytes: a leak would keep an object for each step, in every epoch
    assert held() == before
    accelerator.end_training()


def test_runs_of_different_configurations_follow_each_other_without_a_trace(one_thread):
    settings = [
        {},
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 3},
        {"mixed_precision": "fp16"},
        {"dataloader_config": DataLoaderConfiguration(split_batches=True)},
    ]
    counts, objects = [], []
    for turn in range(20):
        accelerator = Accelerator(**settings[turn % len(settings)])
        assert accelerator.gradient_accumulation_steps == (3 if turn % 5 == 2 else 1)
        assert accelerator.mixed_precision == {1: "bf16", 3: "fp16"}.get(turn % 5, "no")
        model = nn.Linear(4, 2)
        loader = DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)
        for (batch,) in loader:
            accelerator.backward(model(batch).sum())
            optimizer.step()
        model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
        del accelerator, batch
        AcceleratorState._reset_state()
        if turn % 5 == 4:
            gc.collect()
            counts.append(held())
            objects.append(len(gc.get_objects()))
    assert counts[-1] == counts[1]
    growth = [after - earlier for earlier, after in itertools.pairwise(objects)]
    assert min(growth[1:]) < 5, growth  # a leak would keep an object for each of five runs, every time
    assert not GradientState.started()
    assert PartialState().process_index == 0
