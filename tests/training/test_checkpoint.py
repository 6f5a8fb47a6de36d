"""A checkpoint is there whole or not at all, and says so."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torchport import Accelerator
from torchport.checkpoint import atomic
from torchport.checkpoint.weights import load_weights, save_weights
from torchport.errors import CheckpointError, ConfigurationError
from torchport.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def saved(tmp_path):
    accelerator = Accelerator()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    accelerator.save_state(tmp_path / "state")
    return accelerator, tmp_path / "state"


def test_the_manifest_lists_every_file_with_size_and_checksum(saved):
    _, folder = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["world_size"] == 1
    assert manifest["plan"]["strategy"] == "single"
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["files"]["model.safetensors"]["size"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json in it"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest of .* cannot be read"),
        (lambda folder: os.truncate(folder / "model.safetensors", 10), "10 bytes instead of"),
        (lambda folder: _flip(folder / "model.safetensors"), "contents of model.safetensors differ"),
        (lambda folder: _point_outside(folder), "outside its folder"),
    ],
)
def test_damage_is_found_before_anything_is_loaded(saved, damage, message):
    accelerator, folder = saved
    model = accelerator._contents.models[0]
    before = model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        accelerator.load_state(folder)
    assert torch.equal(model.weight, before + 1)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _point_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = {"size": 0, "crc32": "00000000"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_code_in_a_checkpoint_is_never_run(saved, tmp_path):
    accelerator, folder = saved
    witness = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(witness),))

    torch.save({"state": Attack()}, folder / "optimizer.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = atomic.describe(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        accelerator.load_state(folder)
    assert not witness.exists()


def test_other_objects_than_were_saved_are_refused(saved):
    accelerator, folder = saved
    accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="holds 1 models, and 2 are prepared"):
        accelerator.load_state(folder)


def test_weights_of_another_shape_are_refused(saved):
    _, folder = saved
    AcceleratorState._reset_state()
    accelerator = Accelerator()
    model = nn.Linear(4, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        accelerator.load_state(folder)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(saved, tmp_path):
    accelerator, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="rank 0 could not make the folder"):
        accelerator.save_state(tmp_path / "file" / "state")


def test_names_and_hooks(saved, tmp_path):
    accelerator, _folder = saved
    with pytest.raises(CheckpointError, match="save_state needs a folder"):
        accelerator.save_state()
    with pytest.raises(ConfigurationError, match="cannot be registered"):
        accelerator.register_for_checkpointing(object())
    seen = []
    handle = accelerator.register_save_state_pre_hook(lambda models, weights, path: seen.append(path))
    accelerator.save_state(tmp_path / "hooked")
    handle.remove()
    accelerator.save_state(tmp_path / "not-hooked")
    assert seen == [str(tmp_path / "hooked")]


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    shared = torch.randn(4, 4)
    base = torch.randn(10)
    state = {"a": shared, "b": shared, "part": base[:5], "rest": base[5:], "t": torch.randn(2, 3).t()}
    save_weights(state, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded["a"] is loaded["b"]


def test_objects_that_are_no_tensors_need_the_other_format(tmp_path):
    with pytest.raises(CheckpointError, match="safe_serialization=False"):
        save_weights({"extra": {"a": 1}}, tmp_path / "w.safetensors")


KILLED = """
    import sys, torch
    from torchport import Accelerator
    accelerator = Accelerator()
    model = accelerator.prepare(torch.nn.Linear(256, 256))
    step = torch.nn.Parameter(torch.zeros(1))
    print("ready", flush=True)
    while True:
        with torch.no_grad():
            model.weight.add_(1)
        accelerator.save_state(sys.argv[1])
        print("saved", flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    target = tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, str(script), str(target)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    for _ in range(12):  # the kill falls somewhere into the thirteenth save
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    manifest = atomic.verify(target)
    assert "model.safetensors" in manifest["files"]
    weights = load_weights(target / "model.safetensors")
    assert torch.isfinite(weights["weight"]).all()
