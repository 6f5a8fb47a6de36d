"""Saving in the background: what is saved is what was there when save_state was called."""

import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torchport import Accelerator
from torchport.checkpoint import atomic, background, project, snapshot, state
from torchport.checkpoint.snapshot import HostBuffers
from torchport.checkpoint.weights import load_weights
from torchport.errors import CheckpointError
from torchport.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


class Holds:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.fixture
def run():
    accelerator = Accelerator()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    holds = Holds({"list": [1, [2, torch.zeros(2)]]})
    accelerator.register_for_checkpointing(holds)
    return accelerator, model, optimizer, holds


@pytest.fixture
def writes(monkeypatch):
    """The targets of writes, and which of the earlier ones were complete when each began."""
    began, write = [], state.write

    def observed(part, work, target, agreement, **settings):
        began.append((target.name, [name for name, _ in began if (target.parent / name).is_dir()]))
        write(part, work, target, agreement, **settings)

    monkeypatch.setattr(project.state, "write", observed)
    return began


def test_what_changes_after_the_call_is_not_in_the_checkpoint(run, tmp_path, monkeypatch):
    accelerator, model, optimizer, holds = run
    weight = model.weight.detach().clone()
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    write = state.write

    def change_first(*args, **settings):  # in the thread, before anything is written
        with torch.no_grad():
            model.weight.fill_(5.0)
        optimizer.state[model.weight]["exp_avg"].fill_(5.0)
        optimizer.param_groups[0]["lr"] = 5.0
        holds.state["list"][1][1].fill_(5.0)
        holds.state["list"].append("later")
        torch.manual_seed(5)
        write(*args, **settings)

    monkeypatch.setattr(project.state, "write", change_first)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert accelerator.save_state(tmp_path / "state", blocking=False) == str(tmp_path / "state")
    accelerator.wait_for_checkpoint()
    assert model.weight.unique().tolist() == [5.0]
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert str(holds.state) == str({"list": [1, [2, torch.zeros(2)]]})
    assert torch.equal(torch.rand(3), expected)


def test_saves_come_one_after_the_other_and_use_the_same_memory(run, tmp_path, writes):
    accelerator, model, _, _ = run
    memory = []
    for number in range(3):
        with torch.no_grad():
            model.weight.fill_(number)
        accelerator.save_state(tmp_path / f"{number}", blocking=False)
        memory.append(accelerator._checkpoints._buffers._memory)
    assert memory[0] is memory[1] is memory[2]
    accelerator.save_state(tmp_path / "3")
    assert writes == [("0", []), ("1", ["0"]), ("2", ["0", "1"]), ("3", ["0", "1", "2"])]
    for number in range(3):
        weights = load_weights(tmp_path / f"{number}" / "model.safetensors")
        assert weights["weight"].unique().tolist() == [number]
    assert accelerator._checkpoints._buffers.nbytes > 0
    accelerator.free_memory()
    assert accelerator._checkpoints._buffers.nbytes == 0


def next_save(accelerator, folder):
    accelerator.save_state(folder / "next")


def wait(accelerator, folder):
    accelerator.wait_for_checkpoint()


def load(accelerator, folder):
    accelerator.load_state(folder / "good")


def end(accelerator, folder):
    accelerator.end_training()


@pytest.mark.parametrize("notice", [next_save, wait, load, end])
def test_a_failure_is_raised_once_by_whatever_comes_next(run, tmp_path, monkeypatch, notice):
    accelerator, _, _, _ = run
    accelerator.save_state(tmp_path / "good")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda folder, target: 1 / 0)
        accelerator.save_state(tmp_path / "good", blocking=False)
        accelerator._checkpoints._running._thread.join()
    with pytest.raises(CheckpointError) as caught:
        notice(accelerator, tmp_path)
    assert str(caught.value) == (
        f"the checkpoint {tmp_path / 'good'} could not be saved\n"
        "  found:  rank 0 could not complete: ZeroDivisionError: division by zero\n"
        f"  reason: the older checkpoint {tmp_path / 'good'} is still whole"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    accelerator.wait_for_checkpoint()
    atomic.verify(tmp_path / "good")


def test_a_state_that_cannot_be_saved_is_refused_at_once(run, tmp_path):
    accelerator, _, _, holds = run
    holds.state = {"function": len}
    with pytest.raises(CheckpointError, match="could not be loaded again"):
        accelerator.save_state(tmp_path / "state", blocking=False)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
    import atexit
    import sys
    import torch
    from torchport import Accelerator

    atexit.register(print, "exit handlers run", file=sys.stderr, flush=True)
    accelerator = Accelerator()
    accelerator.prepare(torch.nn.Linear(2000, 2000))
    accelerator.save_state(sys.argv[1] + "/whole", blocking=False)
    other = Accelerator()
    other.prepare(torch.nn.Linear(2, 2))
    other._checkpoints._finish = lambda *arguments: 1 / 0
    other.save_state(sys.argv[1] + "/lost", blocking=False)
"""


def test_the_program_ends_after_its_checkpoints_and_fails_saying_which_is_lost(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == (
        f"torchport: the checkpoint {tmp_path / 'lost'} could not be saved\n"
        "  found:  ZeroDivisionError: division by zero\n"
        "exit handlers run\n"
    )
    assert done.returncode == 120  # Python's own, where cleaning up has failed
    atomic.verify(tmp_path / "whole")


def test_a_snapshot_shares_memory_where_the_original_does():
    accelerator = Accelerator()
    buffers = HostBuffers(accelerator.backend, accelerator.device)
    base = torch.arange(12.0)
    state = {
        "view": base[2:8].view(2, 3).t(), "again": base, "strided": base[::3], "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16), "scalar": torch.tensor(3), "bool": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2)), "sparse": torch.eye(2).to_sparse(), "complex": torch.tensor([1j]).conj(),
    }  # fmt: skip
    state["self"] = state
    expected = {name: value.detach().clone() for name, value in state.items() if name != "self"}
    first, second = buffers.snapshot([state, [base]])
    base.fill_(-1.0)
    for name, value in expected.items():
        assert torch.equal(first[name].to_dense(), value.to_dense()), name
        assert (first[name].dtype, first[name].shape) == (value.dtype, value.shape)
    assert first["view"].stride() == (1, 3)
    assert second[0] is first["again"]
    assert first["again"].data_ptr() + 8 == first["view"].data_ptr()
    assert isinstance(first["parameter"], nn.Parameter)
    assert first["self"] is first


def test_several_threads_copy_every_byte_of_a_large_snapshot(monkeypatch):
    monkeypatch.setattr(snapshot, "_MUCH", 1)
    monkeypatch.setattr(snapshot, "_PIECE", 1000)
    accelerator = Accelerator()
    values = [torch.arange(number, dtype=torch.uint8) for number in (0, 1, 63, 999, 1000, 1001, 100_003)]
    expected = [value.clone() for value in values]
    (copies,) = HostBuffers(accelerator.backend, accelerator.device).snapshot([values])
    for value in values:
        value.add_(1)
    assert all(map(torch.equal, copies, expected))


def test_processes_that_are_lost_are_waited_for_together_and_once(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(background, "time", clock)
    store = torch.distributed.HashStore()
    with background.StoreExchange(store, "save", 0, 4) as exchange:
        store.set("torchport/checkpoint/save/1/1", pickle.dumps((None, "present")))
        store.set("torchport/checkpoint/save/parted/1", "1")
        values = exchange.gather((None, "leader"))
        first = clock.now
        assert [value for _, value in values] == ["leader", "present", None, None]
        for rank in (2, 3):
            assert f"rank {rank} has ended, or has not been heard of for 60 seconds" in str(values[rank][0])
        store.set("torchport/checkpoint/save/2/1", pickle.dumps((None, "present")))
        assert [value for _, value in exchange.gather((None, "leader"))] == ["leader", "present", None, None]
    assert background.LOST <= first == clock.now < background.LOST + 1
