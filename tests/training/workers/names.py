"""What two processes share: gathers of different shapes, kept types, compiled replicas, disks, and runs begun again.

Each `check_...` asserts; the outcome of each is written down.
"""

import dataclasses
import gc
import json
import os
import threading
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from checks import run_checks
from torch import nn
from torchport import Accelerator, PartialState, ProjectConfiguration, TorchDynamoPlugin
from torchport.checkpoint import atomic
from torchport.checkpoint.model_folder import save_model
from torchport.errors import CheckpointError, OperationError
from torchport.state import AcceleratorState
from torchport.utils import compile_regions, gather, has_compiled_regions, is_compiled_module

Pair = namedtuple("Pair", "first second")


class Output(OrderedDict):
    """A mapping whose values are attributes too, as models of other libraries return."""

    def __init__(self, **values) -> None:
        super().__init__(values)
        self.__dict__.update(values)

    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value

    def __reduce__(self):
        return _output, (dict(self),)


def _output(values: dict) -> Output:
    return Output(**values)


@dataclasses.dataclass(frozen=True)
class Result:
    logits: torch.Tensor
    hidden: tuple = ()
    cache: object = None


def check_a_gather_of_different_shapes_is_an_error_on_every_rank(folder):
    rank = PartialState().process_index
    ours = [torch.ones(3 - rank, 2), torch.ones(3000 - 1000 * rank, 20), torch.ones([(4,), (2, 2)][rank])]
    for tensor in ours:
        with pytest.raises(OperationError) as raised:
            gather({"logits": tensor})
        text = str(raised.value)
        assert "gather needs tensors of the same shape and dtype on every process" in text
        assert "pad_across_processes" in text
    assert "rank 0: (4,) float32" in text
    assert "rank 1: (2, 2) float32" in text
    with pytest.raises(OperationError, match=r"rank 0: \(2,\) float32\n    rank 1: \(2,\) bfloat16"):
        gather(torch.ones(2, dtype=[torch.float32, torch.bfloat16][rank]))


def check_every_dtype_and_size_is_gathered_exactly(folder):
    rank = PartialState().process_index
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.bool,
        torch.complex64,
        torch.int64,
    )
    for dtype in dtypes:
        for shape in ((), (1,), (3, 2), (0, 4), (1000, 20)):
            mine = torch.full(shape, rank + 1, dtype=dtype)
            parts = [torch.full(shape or (1,), other + 1, dtype=dtype) for other in (0, 1)]
            gathered = gather(mine)
            assert gathered.dtype == dtype
            assert torch.equal(gathered, torch.cat(parts))
    transposed = torch.arange(6).reshape(2, 3).t() + 10 * rank
    both = [torch.arange(6).reshape(2, 3).t() + 10 * other for other in (0, 1)]
    assert torch.equal(gather(transposed), torch.cat(both))


def check_gather_keeps_the_types_of_containers(folder):
    ones = torch.ones(1)
    assert type(gather(Output(a=ones))) is Output
    assert torch.equal(gather(Output(a=ones)).a, torch.ones(2))
    counted = defaultdict(list, a=ones)
    assert gather(counted).default_factory is list
    assert type(gather(OrderedDict(a=ones))) is OrderedDict
    pair = gather(Pair(ones, [ones]))
    assert type(pair) is Pair
    assert torch.equal(pair.second[0], torch.ones(2))
    result = gather(Result(ones, (ones,)))
    assert type(result) is Result
    assert torch.equal(result.hidden[0], torch.ones(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.inner(x)) + x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(4, 2))


def check_compiled_replicas_train_as_plain_ones(folder):
    rank = PartialState().process_index
    results = []
    for plugin in (
        None,
        *(TorchDynamoPlugin(backend="eager", use_regional_compilation=r) for r in (False, True)),
    ):
        AcceleratorState._reset_state()
        torch._dynamo.reset()
        accelerator = Accelerator(dynamo_plugin=plugin)
        model = network()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(3):
            accelerator.backward(model(torch.full((2, 4), 0.1 * (rank + step))).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        inner = accelerator.unwrap_model(model)
        assert type(inner) is nn.Sequential
        assert is_compiled_module(inner) == (plugin is not None and not plugin.use_regional_compilation)
        assert has_compiled_regions(inner) == (plugin is not None and bool(plugin.use_regional_compilation))
        results.append(accelerator.get_state_dict(model))
    for state in results[1:]:
        assert list(state) == list(network().state_dict())
        for name, value in state.items():
            assert torch.equal(value, results[0][name])
    assert torch.equal(gather(results[0]["2.bias"])[:2], gather(results[0]["2.bias"])[2:])
    assert compile_regions(network()) is not None


def check_machines_that_share_no_disk_save_a_checkpoint_each_or_none(folder):
    rank = PartialState().process_index
    home = folder / f"machine{rank}"
    home.mkdir()
    same = Path("/proc/self/cwd/state")  # one name, which means another folder to each process
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, value in {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}.items():
            patch.setenv(name, str(value))
        AcceleratorState._reset_state()
        accelerator = Accelerator()
        accelerator.prepare(network())
        for blocking in (True, False):
            with pytest.raises(CheckpointError) as caught:
                accelerator.save_state(same, blocking=blocking)
            assert "rank 1 could not find the folder that the others write into" in caught.value.found
            assert caught.value.hint == (
                "a folder that all machines share, or ProjectConfiguration(save_on_each_node=True)"
            )
            accelerator.wait_for_everyone()
            assert list(home.iterdir()) == []

        AcceleratorState._reset_state()
        accelerator = Accelerator(project_config=ProjectConfiguration(save_on_each_node=True))
        model = accelerator.prepare(network())
        before = [parameter.detach().clone() for parameter in model.parameters()]
        accelerator.save_state(same)
        assert sorted(atomic.verify(home / "state")["files"]) == [
            "model.safetensors", f"random_states_{rank}.pkl",
        ]  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        accelerator.load_state(same)
        assert all(map(torch.equal, model.parameters(), before))
        assert [path.name for path in home.iterdir()] == ["state"]
    AcceleratorState._reset_state()


def check_a_model_that_the_main_process_cannot_save_keeps_nobody_waiting(folder):
    state = {"weight": torch.ones(1)}  # as a strategy gathers it: all of it on one process
    if PartialState().is_main_process:
        state["extra"] = {"amax": len}
    for safe, problem in ((True, "values that are not tensors: extra"), (False, r"\['amax'\] is a builtin")):
        with pytest.raises(CheckpointError, match=problem):
            save_model(state, folder / "refused", safe_serialization=safe, leader="extra" in state)
    PartialState().wait_for_everyone()
    assert not (folder / "refused").exists()


def _occupied() -> tuple[int, int, int]:
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), threading.active_count()


def check_a_run_is_begun_and_ended_again_and_again_without_a_trace(folder):
    settings = [
        {},
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "fp16"},
    ]
    counts, memory = [], []
    for turn in range(16):
        AcceleratorState._reset_state()
        accelerator = Accelerator(**settings[turn % len(settings)])
        model = network()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()
        accelerator.wait_for_everyone()
        if turn % 2:
            accelerator.end_training()
        else:
            model, optimizer = accelerator.free_memory(model, optimizer)
        del accelerator, model, optimizer
        if turn % len(settings) == len(settings) - 1:  # ended; one group may be held until the next is left
            AcceleratorState._reset_state()
            gc.collect()
            counts.append(_occupied())
            memory.append(psutil.Process().memory_info().rss)
    (folder / f"again{os.environ['RANK']}.json").write_text(json.dumps({"counts": counts, "rss": memory}))
    first, last = counts[1], counts[-1]
    assert last[0] <= first[0], counts
    assert last[1] <= first[1], counts
    assert last[2] == first[2], counts
    assert memory[-1] - memory[1] < 8 << 20, memory


if __name__ == "__main__":
    run_checks(dict(globals()))
