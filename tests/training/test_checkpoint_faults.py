"""What is wrong with a checkpoint, or with the disk, is said; the older checkpoint stays and is named."""

import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchport import Accelerator, ProjectConfiguration
from torchport.checkpoint import atomic
from torchport.errors import CheckpointError
from torchport.state import AcceleratorState

DISK = 4 << 20  # bytes
LARGE = 1 << 21  # values


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


def project(folder):
    settings = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(project_config=settings)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    holds = Holds({"numbers": torch.arange(3)})
    accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(holds)
    return accelerator, model, holds


def truncate(folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def flip(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def list_as(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("optimizer.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link(folder, name):
    elsewhere = folder.parent.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


class Attack:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (self.witness,))


def infect(folder, name):
    """Replace a file by a pickle that runs code, and make the manifest agree."""
    torch.save({"numbers": Attack(str(folder.parent.parent / "witness"))}, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = atomic.describe(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "what", "text"),
    [
        (truncate, "model.safetensors", "is damaged\n  found:  model.safetensors has 103 bytes instead of 104"),
        (flip, "optimizer.bin", "is damaged\n  found:  the contents of optimizer.bin differ from what was written"),
        (flip, "model.safetensors", "the contents of model.safetensors differ from what was written"),
        (lambda f, n: (f / n).unlink(), "random_states_0.pkl", "is damaged\n  found:  random_states_0.pkl is missing"),
        (lambda f, n: (f / n).unlink(), "manifest.json", "is not a complete checkpoint\n  found:  no manifest.json"),
        (list_as, "../elsewhere", "refers to '../elsewhere', outside its folder\n  reason: it leads up"),
        (list_as, "a/../../../elsewhere", "outside its folder\n  reason: it leads up"),
        (list_as, "/etc/passwd", "refers to '/etc/passwd', outside its folder\n  reason: it is an absolute path"),
        (link, "optimizer.bin", "refers to 'optimizer.bin', outside its folder\n  reason: it is a link to"),
        (infect, "custom_checkpoint_0.pkl", "cannot be read\n  reason: it holds code, which has not been run: posix.mkdir"),
    ],
)  # fmt: skip
def test_a_bad_checkpoint_is_refused_and_the_older_one_named_and_loaded(tmp_path, damage, what, text):
    accelerator, model, holds = project(tmp_path)
    accelerator.save_state()
    saved = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    accelerator.save_state()
    folder = tmp_path / "checkpoints" / "checkpoint_1"
    size = (folder / "model.safetensors").stat().st_size
    damage(folder, what)
    with torch.no_grad():
        model.weight.fill_(7.0)
    older = tmp_path / "checkpoints" / "checkpoint_0"
    with pytest.raises(CheckpointError) as caught:
        accelerator.load_state(folder)
    shown = str(caught.value).replace(
        f"has {size - 1} bytes instead of {size}", "has 103 bytes instead of 104"
    )
    assert text in shown
    assert str(folder) in shown
    assert f"load_state('{older}')" in shown
    if damage is not infect:  # whose damage is found when its turn comes
        assert torch.equal(model.weight, torch.full_like(model.weight, 7.0))
    assert holds.state["numbers"].tolist() == [0, 1, 2]
    assert not (tmp_path / "witness").exists()
    accelerator.load_state(older)
    assert torch.equal(model.weight, saved)


@contextmanager
def tiny_disk(folder):
    """Mount a file system of a few megabytes."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_files(folder):
    """Let no file of this process grow beyond some megabytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("limited", "reason"),
    [(tiny_disk, "[Errno 28] No space left on device"), (small_files, "[Errno 27] File too large")],
)
@pytest.mark.parametrize("where", ["weights", "other"])
def test_a_full_disk_is_said_and_the_older_checkpoint_stays(tmp_path, limited, reason, where, blocking):
    folder = tmp_path / "disk"
    with limited(folder):
        accelerator, model, holds = project(folder)
        accelerator.save_state()
        if where == "weights":
            model.register_buffer("large", torch.zeros(LARGE))
        else:
            holds.state = {"numbers": torch.zeros(LARGE)}
        name = "model.safetensors" if where == "weights" else "custom_checkpoint_0.pkl"

        def save():
            accelerator.save_state(blocking=blocking)
            accelerator.wait_for_checkpoint()

        with pytest.raises(CheckpointError) as caught:
            save()
        home = folder / "checkpoints"
        assert str(caught.value) == (
            f"the checkpoint {home / 'checkpoint_1'} could not be saved\n"
            f"  found:  rank 0 could not write: OSError: {reason}: '{name}'\n"
            f"  reason: the newest complete checkpoint is {home / 'checkpoint_0'}"
        )
        assert [path.name for path in home.iterdir()] == ["checkpoint_0"]
        atomic.verify(home / "checkpoint_0")
        if limited is tiny_disk:
            assert shutil.disk_usage(folder).used < DISK // 4
        holds.state, model._buffers["large"] = {}, torch.zeros(1)
        assert accelerator.save_state() == str(home / f"checkpoint_{1 if blocking else 2}")


def test_a_folder_that_can_only_be_read_is_said_and_the_older_checkpoint_stays(tmp_path):
    folder = tmp_path / "disk"
    with tiny_disk(folder) if os.geteuid() == 0 else small_files(folder):
        accelerator, _, _ = project(folder)
        accelerator.save_state()
        home = folder / "checkpoints"
        if os.geteuid() == 0:  # whom permissions do not stop
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            reason = "Read-only file system"
        else:
            home.chmod(0o555)
            reason = "Permission denied"
        try:
            with pytest.raises(CheckpointError) as caught:
                accelerator.save_state(blocking=False)
        finally:
            if os.geteuid():
                home.chmod(0o755)
        text = str(caught.value)
        assert f"the checkpoint {home / 'checkpoint_1'} could not be saved" in text
        assert "rank 0 could not make the folder" in text
        assert f"OSError: {reason}" in text or f"PermissionError: {reason}" in text
        assert [path.name for path in home.iterdir()] == ["checkpoint_0"]
        accelerator.load_state()
