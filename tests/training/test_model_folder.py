"""Weights for other programs: in one file or several, with an index; and back into a model."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchport import Accelerator, load_checkpoint_in_model
from torchport.errors import CheckpointError, ConfigurationError, UnsupportedOperationError
from torchport.state import AcceleratorState
from torchport.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    load,
    load_state_dict,
    save,
)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_in_one_file_and_back(accelerator, tmp_path, safe):
    model = accelerator.prepare(Tied())
    accelerator.save_model(model, tmp_path / "m", safe_serialization=safe)
    assert files(tmp_path / "m") == [SAFE_WEIGHTS_NAME if safe else WEIGHTS_NAME]
    loaded = Tied()
    load_checkpoint_in_model(loaded, tmp_path / "m", strict=True)
    assert same(loaded, model)
    assert loaded.head.weight is loaded.embed.weight


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_in_several_files_with_an_index(accelerator, tmp_path, safe):
    model, folder = Tied(), tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    accelerator.save_model(model, folder, max_shard_size=200, safe_serialization=safe)
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    names = [f"{stem}-{n:05d}-of-00003{suffix}" for n in (1, 2, 3)]
    index = SAFE_WEIGHTS_INDEX_NAME if safe else WEIGHTS_INDEX_NAME
    assert files(folder) == sorted(["config.json", index, *names])
    told = json.loads((folder / index).read_text())
    first = dict.fromkeys(["steps", "embed.weight", "head.weight"], names[0])
    second = dict.fromkeys(["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"], names[1])
    third = dict.fromkeys(["body.2.weight", "body.2.bias"], names[2])
    assert told["weight_map"] == {**first, **second, **third}
    if safe:
        assert load_file(folder / names[1])["body.0.bias"].tolist() == model.body[0].bias.tolist()
        assert "head.weight" not in load_file(folder / names[0])  # the same tensor as embed.weight
    for place in (folder, folder / index):
        loaded = Tied()
        load_checkpoint_in_model(loaded, place, strict=True)
        assert same(loaded, model)


def test_files_of_an_earlier_save_go_and_others_stay(accelerator, tmp_path):
    model = Tied()
    (tmp_path / "tokenizer.json").write_text("{}")
    accelerator.save_model(model, tmp_path, max_shard_size=200)
    accelerator.save_model(model, tmp_path, max_shard_size="1KB")
    assert files(tmp_path) == ["model.safetensors", "tokenizer.json"]
    accelerator.save_model(model, tmp_path, max_shard_size="0.3KB")
    assert "model.safetensors" not in files(tmp_path)
    loaded = Tied()
    load_checkpoint_in_model(loaded, tmp_path, strict=True)
    assert same(loaded, model)


@pytest.mark.parametrize("size", ["a lot", "10 furlongs", 0, "-1GB", ""])
def test_a_size_that_is_none_is_refused(accelerator, tmp_path, size):
    with pytest.raises(ConfigurationError, match="is no size"):
        accelerator.save_model(Tied(), tmp_path, max_shard_size=size)


def test_weights_are_converted_and_names_compared(accelerator, tmp_path):
    accelerator.save_model(Tied(), tmp_path)
    loaded = Tied()
    load_checkpoint_in_model(loaded, tmp_path, {"": "cpu"}, dtype="bfloat16")
    assert loaded.embed.weight.dtype == torch.bfloat16
    other = nn.ModuleDict({"embed": nn.Embedding(10, 4), "extra": nn.Linear(1, 1)})
    before = other["embed"].weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_in_model(other, tmp_path, strict=True)
    assert "without extra.bias, extra.weight; with body.0.bias" in str(caught.value)
    assert torch.equal(other["embed"].weight, before)
    load_checkpoint_in_model(other, tmp_path)
    assert not torch.equal(other["embed"].weight, before)
    with pytest.raises(CheckpointError, match=r"size mismatch for embed\.weight"):
        load_checkpoint_in_model(nn.ModuleDict({"embed": nn.Embedding(9, 4)}), tmp_path)
    with pytest.raises(UnsupportedOperationError, match="device maps with several entries"):
        load_checkpoint_in_model(loaded, tmp_path, {"embed": "cpu", "body": "disk"})


class Attack:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (self.witness,))


def test_a_bad_folder_is_refused_before_anything_is_loaded(accelerator, tmp_path):
    folder, model = tmp_path / "m", Tied()
    accelerator.save_model(model, folder, max_shard_size=200)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    good = json.loads(index.read_text())
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(elsewhere)
    for name, text in (
        ("../elsewhere.safetensors", "outside its folder\n  reason: it leads up; nothing has been loaded"),
        (str(elsewhere), "outside its folder\n  reason: it is an absolute path; nothing has been loaded"),
        (
            "link.safetensors",
            f"outside its folder\n  reason: it is a link to {elsewhere}; nothing has been loaded",
        ),
        (
            "model-00004-of-00003.safetensors",
            "is not complete\n  found:  model-00004-of-00003.safetensors is missing",
        ),
    ):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "embed.weight": name}}))
        loaded = Tied()
        before = loaded.body[0].weight.clone()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint_in_model(loaded, folder)
        assert text in str(caught.value)
        assert torch.equal(loaded.body[0].weight, before)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index .* cannot be read"):
        load_checkpoint_in_model(Tied(), folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="there are no weights in"):
        load_checkpoint_in_model(Tied(), tmp_path / "none")
    os.truncate(elsewhere, 50)
    with pytest.raises(CheckpointError, match=r"elsewhere\.safetensors cannot be read"):
        load_checkpoint_in_model(Tied(), elsewhere)
    torch.save({"embed.weight": Attack(str(tmp_path / "witness"))}, tmp_path / "code.bin")
    for read in (lambda path: load_checkpoint_in_model(Tied(), path), load_state_dict, load):
        with pytest.raises(CheckpointError, match=r"it holds code, which has not been run: posix\.mkdir"):
            read(tmp_path / "code.bin")
    assert not (tmp_path / "witness").exists()


def test_the_links_of_a_hub_cache_are_followed(accelerator, tmp_path):
    model, snapshot = Tied(), tmp_path / "models--a--b" / "snapshots" / "main"
    accelerator.save_model(model, snapshot, max_shard_size=200)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    loaded = Tied()
    load_checkpoint_in_model(loaded, snapshot, strict=True)
    assert same(loaded, model)


def test_objects_are_saved_and_loaded(accelerator, tmp_path):
    state = {"a": torch.arange(3), "b": torch.ones(2)}
    for name, safe in (("x.bin", False), ("x.safetensors", True)):
        save(state, tmp_path / name, safe_serialization=safe)
        accelerator.save(state, tmp_path / f"2-{name}", safe_serialization=safe)
        for path in (tmp_path / name, tmp_path / f"2-{name}"):
            assert {key: value.tolist() for key, value in load(path).items()} == {"a": [0, 1, 2], "b": [1, 1]}
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("way", ["accelerator", "function"])
def test_a_file_that_cannot_be_written_is_said(accelerator, tmp_path, way, safe):
    write = accelerator.save if way == "accelerator" else save
    missing = tmp_path / "nowhere"
    with pytest.raises(CheckpointError) as caught:
        write({"a": torch.ones(2)}, missing / "x", safe_serialization=safe)
    assert str(caught.value) == (
        f"{missing / 'x'} cannot be written\n"
        f"  found:  there is no folder {missing}\n"
        f"  try:    Path('{missing}').mkdir(parents=True) on the main process, before saving"
    )
    with pytest.raises(CheckpointError, match=r"cannot be written\n  reason: .*Is a directory"):
        write({"a": torch.ones(2)}, tmp_path, safe_serialization=safe)
