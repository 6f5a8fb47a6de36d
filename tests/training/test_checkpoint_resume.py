"""How a run that was killed goes on."""

import os
import time

import pytest
import torch
from torch import nn
from torchport import Accelerator, Progress, ProjectConfiguration
from torchport.checkpoint import atomic
from torchport.checkpoint.work import WorkFolder, clean
from torchport.errors import CheckpointError, ConfigurationError
from torchport.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.delenv("TORCHPORT_RESUME", raising=False)
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def run(**settings):
    AcceleratorState._reset_state()
    accelerator = Accelerator(**settings)
    model = accelerator.prepare(nn.Linear(1, 1))
    progress = Progress(epoch=0, best=None)
    accelerator.register_for_checkpointing(progress)
    return accelerator, model, progress


def test_the_first_run_begins_anew_and_the_next_goes_on(tmp_path):
    accelerator, model, progress = run(project_dir=tmp_path, resume="auto")
    assert accelerator.resume() is None
    assert accelerator.resumed_from is None
    for epoch in (1, 2):
        progress.epoch, progress.best = epoch, 0.5
        with torch.no_grad():
            model.weight.fill_(epoch)
        accelerator.save_state()
    (tmp_path / "checkpoints" / "checkpoint_7").mkdir()  # without a manifest: not complete
    accelerator, model, progress = run(project_dir=tmp_path, resume="auto")
    newest = str(tmp_path / "checkpoints" / "checkpoint_1")
    assert accelerator.resume() == accelerator.resumed_from == newest
    assert repr(progress) == "Progress(epoch=2, best=0.5)"
    assert model.weight.item() == 2.0
    assert accelerator.save_iteration == 2
    assert accelerator.resume() == newest  # nothing is loaded twice
    assert accelerator.save_state() == str(tmp_path / "checkpoints" / "checkpoint_2")


def test_the_variable_counts_where_the_script_does_not_say(tmp_path, monkeypatch):
    accelerator, _, progress = run(project_dir=tmp_path)
    progress.epoch = 4
    accelerator.save_state(tmp_path / "mine")
    monkeypatch.setenv("TORCHPORT_RESUME", str(tmp_path / "mine"))
    accelerator, _, progress = run()
    assert accelerator.resume() == str(tmp_path / "mine")
    assert progress.epoch == 4
    accelerator, _, progress = run(resume="")
    assert accelerator.resume() is None
    monkeypatch.setenv("TORCHPORT_RESUME", "auto")
    with pytest.raises(ConfigurationError, match=r"TORCHPORT_RESUME=auto needs a folder"):
        run()
    config = ProjectConfiguration(project_dir=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"TORCHPORT_RESUME=auto needs numbered checkpoints"):
        run(project_config=config)


def test_a_run_that_was_told_to_go_on_and_has_not_cannot_save(tmp_path):
    accelerator, _, _ = run(project_dir=tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match=r"has not gone on from 'auto'"):
        accelerator.save_state()
    assert list(tmp_path.iterdir()) == []
    accelerator.resume()
    accelerator.save_state()


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path):
    accelerator, _, _ = run(project_dir=tmp_path, resume="auto")
    accelerator.resume()
    accelerator.save_state()
    accelerator.save_state()
    home = tmp_path / "checkpoints"
    (home / "checkpoint_1" / "model.safetensors").unlink()
    accelerator, _, _ = run(project_dir=tmp_path, resume="auto")
    with pytest.raises(CheckpointError) as caught:
        accelerator.resume()
    assert f"load_state('{home / 'checkpoint_0'}')" in str(caught.value)


def test_progress_has_the_names_it_was_made_with():
    progress = Progress(epoch=0)
    with pytest.raises(AttributeError, match="has no 'step': it was made with epoch"):
        _ = progress.step
    progress.load_state_dict({"step": 3})
    assert (progress.epoch, progress.step) == (0, 3)


def leftovers(folder):
    return sorted(path.name for path in folder.glob(".*"))


def test_what_killed_saves_left_is_taken_away_and_what_lives_is_not(tmp_path):
    living = WorkFolder(tmp_path / "a", "0" * 8, True)
    living.open()
    dead = WorkFolder(tmp_path / "b", "1" * 8, True)
    dead.open()
    os.close(dead._descriptor)  # as when its process ends
    (tmp_path / ".c.deleted-22222222").mkdir()
    unknown = tmp_path / ".d.writing-33333333"  # without a lock: on a file system that has none
    unknown.mkdir()
    abandoned = tmp_path / ".e.writing-44444444"
    abandoned.mkdir()
    os.utime(abandoned, (time.time() - 90_000,) * 2)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".f.writing-notours").mkdir()
    clean(tmp_path)
    kept = [".a.00000000.lock", ".a.writing-00000000", ".d.writing-33333333", ".f.writing-notours", ".hidden"]
    assert leftovers(tmp_path) == kept
    living.close()
    assert leftovers(tmp_path) == kept[2:]


@pytest.mark.parametrize(
    ("divided", "hint"),
    [
        (False, "a folder that all machines share, or ProjectConfiguration(save_on_each_node=True)"),
        (True, "a folder that all machines share"),  # a machine's own parts could not be loaded
    ],
)
def test_a_folder_that_another_machine_has_made_is_missed_with_what_helps(tmp_path, divided, hint):
    with pytest.raises(CheckpointError, match="is not there") as caught:
        WorkFolder(tmp_path / "a", "0" * 8, leader=False).check(divided)
    assert caught.value.hint == hint


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    accelerator, _, _ = run()
    accelerator.save_state(tmp_path / "state")
    (tmp_path / "state").rename(tmp_path / ".state.older-00000000")
    (tmp_path / ".state.00000000.lock").write_text("")
    accelerator.save_state(tmp_path / "other")
    atomic.verify(tmp_path / "state")
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_is_not_there_is_missed_before_training(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such folder\n  reason: asked for by the argument resume"):
        Accelerator(resume=tmp_path / "nowhere")
    AcceleratorState._reset_state()
    monkeypatch.setenv("TORCHPORT_RESUME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no manifest\.json\n  reason: asked for by TORCHPORT_RESUME"):
        Accelerator()
    AcceleratorState._reset_state()
    with pytest.raises(ConfigurationError, match="resume=True is no checkpoint"):
        Accelerator(resume=True)


def test_the_state_of_another_kind_of_optimizer_is_refused(tmp_path):
    accelerator, model, _ = run()
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(tmp_path / "sgd")
    accelerator, model, _ = run()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        CheckpointError, match=r"optimizer\.bin was saved by another kind of optimizer"
    ) as refused:
        accelerator.load_state(tmp_path / "sgd")
    assert "dampening" in str(refused.value)
    assert "betas" in str(refused.value)
    assert "betas" in optimizer.param_groups[0]
