"""A checkpoint is there whole or not at all, and says so."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchport import Accelerator, ProjectConfiguration
from torchport.checkpoint import atomic, project, work
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


def test_a_checkpoint_without_a_file_that_a_process_has_written_is_not_published(tmp_path):
    hidden = tmp_path / ".state.writing-00000000"
    hidden.mkdir()
    (hidden / "mine").write_text("1")
    known = {name: {"size": 1, "crc32": "83dcefb7"} for name in ("mine", *"abcde")}
    with pytest.raises(
        CheckpointError, match=r"no a, b, c and 2 others\n.*a folder that all machines share"
    ) as caught:
        atomic.publish(hidden, tmp_path / "state", {}, known)
    assert "files that were written are not in" in str(caught.value)
    assert not (tmp_path / "state").exists()


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


def test_a_save_hook_gets_models_states_and_a_folder_and_its_files_are_kept(saved, tmp_path):
    accelerator, _ = saved
    model = accelerator._contents.models[0]

    def hook(models, weights, output_dir):
        assert models == [model]
        assert [sorted(state) for state in weights] == [["bias", "weight"]]
        inner = Path(output_dir) / "inner"
        inner.mkdir()
        (inner / "config.json").write_text("{}")
        (inner / "manifest.json").write_text("mine")

    handle = accelerator.register_save_state_pre_hook(hook)
    for _ in range(2):  # the second replaces the first, files of the hook included
        accelerator.save_state(tmp_path / "hooked")
    handle.remove()
    assert (tmp_path / "hooked/inner/config.json").read_text() == "{}"
    assert {"inner/config.json", "inner/manifest.json", "model.safetensors"} <= set(
        atomic.verify(tmp_path / "hooked")["files"]
    )
    accelerator.save_state(tmp_path / "not-hooked")
    assert not (tmp_path / "not-hooked/inner").exists()


def test_hooks_save_and_load_the_models_that_they_take_out_of_the_list(tmp_path):
    accelerator = Accelerator()
    first, second = accelerator.prepare(nn.Linear(1, 1), nn.Linear(2, 2))
    values = second.weight.detach().clone()
    accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: weights.pop(0))
    accelerator.save_state(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").glob("model*")] == ["model_1.safetensors"]
    with torch.no_grad():
        first.weight.fill_(5.0)
        second.weight.fill_(5.0)
    with pytest.raises(CheckpointError, match="has no weights of model 0"):
        accelerator.load_state(tmp_path / "state")
    accelerator.register_load_state_pre_hook(lambda models, input_dir: models.pop(0))
    accelerator.load_state(tmp_path / "state")
    assert first.weight.item() == 5.0
    assert torch.equal(second.weight, values)
    assert accelerator._contents.models == [first, second]


def test_a_hook_cannot_write_the_manifest(saved):
    accelerator, folder = saved
    before = (folder / "manifest.json").read_text()
    accelerator.register_save_state_pre_hook(
        lambda models, weights, output_dir: Path(output_dir, "manifest.json").write_text("mine")
    )
    with pytest.raises(CheckpointError, match=r"save hook has written a file manifest\.json"):
        accelerator.save_state(folder)
    assert (folder / "manifest.json").read_text() == before
    assert [path.name for path in folder.parent.iterdir()] == ["state"]


def test_a_folder_that_holds_anything_else_is_not_replaced(saved, tmp_path):
    accelerator, folder = saved
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("precious")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.py").write_text("precious")
    file = tmp_path / "file"
    file.write_text("precious")
    for target, found in ((folder, "logs/events"), (other, "train.py"), (file, "a file of that name")):
        with pytest.raises(CheckpointError, match=found):
            accelerator.save_state(target)
    assert (folder / "logs/events").read_text() == "precious"
    assert (other / "train.py").read_text() == "precious"
    assert file.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "state"]


def test_the_working_directory_and_what_contains_it_are_not_replaced(saved, monkeypatch):
    accelerator, folder = saved
    inside = folder / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for target, found in ((".", "it is the working directory"), (folder, "is in it")):
        with pytest.raises(CheckpointError, match=found):
            accelerator.save_state(target)
    assert inside.is_dir()
    atomic.verify(folder)


def test_an_empty_folder_and_a_link_to_a_checkpoint_are_saved_into(saved, tmp_path):
    accelerator, folder = saved
    (tmp_path / "empty").mkdir()
    accelerator.save_state(tmp_path / "empty")
    atomic.verify(tmp_path / "empty")
    link = tmp_path / "latest"
    link.symlink_to(folder)
    with torch.no_grad():
        accelerator._contents.models[0].weight.fill_(3.0)
    assert accelerator.save_state(link) == str(link)
    assert link.is_symlink()
    assert load_weights(folder / "model.safetensors")["weight"].unique().tolist() == [3.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "latest", "state"]


class Holds:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_numpy_values_come_back_as_plain_values_and_tensors(tmp_path):
    accelerator = Accelerator()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    accelerator.prepare(model, optimizer, scheduler)
    state = {
        "best": np.float64(0.5),
        np.int64(3): [np.bool_(True)],
        "seen": np.arange(4)[::-1],
        "t": (1, {2}),
    }
    holder = Holds(state)
    accelerator.register_for_checkpointing(holder)
    accelerator.save_state(tmp_path / "state")
    assert holder.state is state
    accelerator.load_state(tmp_path / "state")
    seen = holder.state.pop("seen")
    assert seen.tolist() == [3, 2, 1, 0]
    assert isinstance(seen, torch.Tensor)
    assert holder.state == {"best": 0.5, 3: [True], "t": (1, {2})}
    assert type(holder.state["best"]) is float
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"when": [datetime(2020, 1, 1)]}, r"state\['when'\]\[0\] is a datetime.datetime"),
        (Fraction(1, 2), "its state is a fractions.Fraction"),
        ({"a": np.array(["text"])}, r"state\['a'\] is a numpy.ndarray of dtype <U4"),
        ({"f": lambda: 0}, r"state\['f'\] is a function"),
    ],
)
def test_a_state_that_could_not_be_loaded_again_is_not_saved(saved, state, found):
    accelerator, folder = saved
    before = (folder / "manifest.json").read_text()
    accelerator.register_for_checkpointing(Holds(state))
    with pytest.raises(CheckpointError, match=r"Holds \(custom_checkpoint_0\.pkl\)[^$]*" + found):
        accelerator.save_state(folder)
    assert (folder / "manifest.json").read_text() == before
    assert [path.name for path in folder.parent.iterdir()] == ["state"]


def numbered_project(folder, **settings):
    AcceleratorState._reset_state()
    project = ProjectConfiguration(
        project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=3, **settings
    )
    accelerator = Accelerator(project_config=project)
    accelerator.prepare(nn.Linear(1, 1))
    return accelerator


def test_the_limit_deletes_what_was_saved_first_whatever_its_number(tmp_path):
    folder = tmp_path / "checkpoints"
    accelerator = numbered_project(tmp_path, iteration=5)
    for _ in range(3):
        accelerator.save_state()
    (folder / "checkpoint_99").mkdir()
    (folder / "checkpoint_99" / "notes").write_text("not a checkpoint of ours")
    accelerator = numbered_project(tmp_path)
    assert accelerator.save_state() == str(folder / "checkpoint_0")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint_0", "checkpoint_6", "checkpoint_7", "checkpoint_99"]
    accelerator.load_state()
    assert accelerator.project_configuration.iteration == 1


def test_of_an_old_checkpoint_that_was_moved_elsewhere_the_link_is_deleted(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    accelerator = numbered_project(tmp_path)
    for _ in range(3):
        accelerator.save_state()
    (folder / "checkpoint_0").rename(elsewhere)
    (folder / "checkpoint_0").symlink_to(elsewhere)
    accelerator.save_state()
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint_{n}" for n in (1, 2, 3)]
    atomic.verify(elsewhere)


@pytest.mark.parametrize("blocking", [True, False])
def test_an_old_checkpoint_that_cannot_be_deleted_is_warned_of_and_saves_go_on(
    tmp_path, monkeypatch, blocking
):
    folder = tmp_path / "checkpoints"
    accelerator = numbered_project(tmp_path)
    remove = work.remove
    deleted = []

    def refuse_the_first(path):
        deleted.append(path.name)
        if path.name == "checkpoint_0":
            raise PermissionError(13, "Permission denied", str(path))
        if path.name == "checkpoint_1":
            shutil.rmtree(path)  # as another program may do at this moment
        remove(path)

    monkeypatch.setattr(project, "remove", refuse_the_first)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(5):
            saved = accelerator.save_state(blocking=blocking)
            assert saved == str(folder / f"checkpoint_{number}")
        accelerator.wait_for_checkpoint()
    assert [str(warning.message) for warning in told] == [
        f"the checkpoint {folder / f'checkpoint_{number}'} has been saved, but the older one"
        f" {folder / 'checkpoint_0'} cannot be deleted (PermissionError: [Errno 13] Permission denied:"
        f" '{folder / 'checkpoint_0'}'): delete it, or save without total_limit"
        for number in (3, 4)
    ]
    assert deleted == ["checkpoint_0", "checkpoint_0", "checkpoint_1"]
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint_{n}" for n in (0, 2, 3, 4)]


def test_each_optimizer_is_saved_and_loaded_with_the_model_that_owns_its_parameters(tmp_path):
    accelerator = Accelerator()
    first, second = nn.Linear(1, 1), nn.Linear(2, 2)
    of_second = torch.optim.SGD(second.parameters(), lr=0.1)
    of_first = torch.optim.SGD(first.parameters(), lr=0.1)
    accelerator.prepare(first, second, of_second, of_first)
    strategy, asked = accelerator._contents.strategy, []
    saves, loads = strategy.optimizer_state_dict, strategy.load_optimizer_state_dict

    def save(model, optimizer):
        asked.append((model, optimizer))
        return saves(model, optimizer)

    def load(model, optimizer, state):
        asked.append((model, optimizer))
        loads(model, optimizer, state)

    strategy.optimizer_state_dict, strategy.load_optimizer_state_dict = save, load
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    assert asked == [(second, of_second), (first, of_first)] * 2


@pytest.mark.parametrize(("saving", "loading"), [(True, False), (False, True), (True, True)])
def test_a_compiled_model_has_the_names_of_the_model_itself(tmp_path, saving, loading):
    def prepared(compiled):
        AcceleratorState._reset_state()
        accelerator, inner = Accelerator(), nn.Sequential(nn.Linear(1, 1))
        accelerator.prepare(torch.compile(inner) if compiled else inner)
        return accelerator, inner

    accelerator, saved = prepared(saving)
    accelerator.save_state(tmp_path / "state")
    assert sorted(load_weights(tmp_path / "state/model.safetensors")) == ["0.bias", "0.weight"]
    accelerator, loaded = prepared(loading)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(loaded[0].weight, saved[0].weight)


def test_a_checkpoint_of_another_type_of_device_is_loaded_and_the_generator_of_this_one_seeded(
    tmp_path, monkeypatch
):
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(1, 1))
    accelerator.save_state(tmp_path / "state")
    name = "random_states_0.pkl"
    states = torch.load(tmp_path / "state" / name, weights_only=True)
    assert states["device_type"] == "cpu"
    saved = hashlib.sha256(states["torch"].numpy().tobytes() + bytes(8)).digest()
    expected = torch.rand(3), random.random(), np.random.rand()

    foreign = states | {"device_type": "other", "device": torch.zeros(16, dtype=torch.uint8)}
    torch.save(foreign, tmp_path / "state" / name)
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    manifest["files"] = atomic.describe(tmp_path / "state")
    (tmp_path / "state" / "manifest.json").write_text(json.dumps(manifest))
    with torch.no_grad():
        model.weight.fill_(7.0)
    seeds, seed = [], accelerator.backend.seed
    monkeypatch.setattr(accelerator.backend, "seed", lambda value: seeds.append(value) or seed(value))
    accelerator.load_state(tmp_path / "state")
    assert seeds == [int.from_bytes(saved[:8], "little") % 2**63]
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert model.weight.item() != 7.0


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_that_goes_back_amid_a_window_begins_a_new_one_without_its_gradients(tmp_path, inside):
    accelerator = Accelerator(gradient_accumulation_steps=3)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.save_state(tmp_path / "state")
    steps = []
    for value in (1.0, float("nan"), 2.0, 4.0, 6.0, 8.0):
        with accelerator.accumulate(model):
            loss = model(torch.full((1, 1), value)).sum()
            accelerator.backward(loss)
            if inside and loss.isnan():
                accelerator.load_state(tmp_path / "state")
                assert model.weight.grad is None
                continue
            optimizer.step()
            steps.append((accelerator.sync_gradients, model.weight.item()))
            optimizer.zero_grad()
        if loss.isnan():
            accelerator.load_state(tmp_path / "state")
            assert model.weight.grad is None
            steps.pop()
    assert steps == [(False, 1.0), (False, 1.0), (False, 1.0), (True, -1.0), (False, -1.0)]


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
