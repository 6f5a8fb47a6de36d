"""Checkpoints within, between and without ways to shard, and over other numbers of processes."""

import json

import pytest
import torch
from torchport.checkpoint.weights import load_weights
from torchport_fsdp import merge_fsdp_weights

pytestmark = pytest.mark.multiprocess
WAYS = ["2 sharded", "2 full", "1 sharded", "1 full", "plain"]


@pytest.fixture(scope="module")
def saved(four):
    """By four processes: three steps, a checkpoint, and three more."""
    return four[0]


@pytest.fixture(scope="module")
def two(run_worker, folder, saved):
    return run_worker("checkpoints.py", "load", str(folder), processes=2)[0]


@pytest.fixture(scope="module")
def one(run_worker, folder, saved):
    names = ("2 sharded", "plain")
    return run_worker("checkpoints.py", "load", str(folder), *names, processes=1)[0]


def goes_on(saved: dict, loaded: dict, source: str, target: str) -> None:
    result = loaded[f"{source} -> {target}"]
    assert result["saved"] == saved[source]["saved"]
    assert result["losses"] == pytest.approx(saved[source]["losses"], abs=1e-6)


@pytest.mark.parametrize("source", [*WAYS, "hybrid"])
@pytest.mark.parametrize("target", WAYS)
def test_what_four_processes_saved_goes_on_in_two_under_any_strategy(saved, two, source, target):
    goes_on(saved, two, source, target)


@pytest.mark.parametrize("source", [*WAYS, "hybrid"])
@pytest.mark.parametrize("target", ["2 sharded", "plain"])
def test_what_four_processes_saved_goes_on_in_one(saved, one, source, target):
    goes_on(saved, one, source, target)


@pytest.mark.parametrize("source", [*WAYS, "hybrid"])
@pytest.mark.parametrize("target", ["2 sharded", "hybrid"])
def test_a_loaded_checkpoint_equals_a_run_that_was_not_interrupted(saved, source, target):
    goes_on(saved, saved, source, target)


def test_every_process_writes_its_own_part(folder, saved):
    manifest = json.loads((folder / "2 sharded" / "manifest.json").read_text())
    assert manifest["shards"] == "dcp"
    parts = {f"{name}_0/__{rank}_0.distcp" for name in ("pytorch_model", "optimizer") for rank in range(4)}
    assert parts <= set(manifest["files"])
    assert not any("safetensors" in name for name in manifest["files"])
    whole = json.loads((folder / "2 full" / "manifest.json").read_text())
    assert {"model.safetensors", "optimizer.bin"} <= set(whole["files"])


def test_another_model_is_refused(two):
    assert "does not fit: weight has the shape (3, 3)" in two["other model"]


@pytest.mark.parametrize("source", ["2 sharded", "1 sharded", "hybrid"])
@pytest.mark.parametrize("safe", [True, False])
def test_merged_weights_load_into_the_plain_model_with_equal_tensors(folder, saved, tmp_path, source, safe):
    [file] = merge_fsdp_weights(folder / source, tmp_path, safe_serialization=safe)
    assert file.name == ("model.safetensors" if safe else "pytorch_model.bin")
    state = load_weights(file) if safe else torch.load(file, weights_only=True)
    assert {name: value.tolist() for name, value in state.items()} == saved[source]["saved"]


@pytest.mark.parametrize("target", WAYS)
def test_a_job_that_is_killed_while_saving_goes_on_from_the_older_checkpoint(killed, two, target):
    goes_on(killed, two, "killed", target)


@pytest.mark.parametrize("target", ["2 sharded", "plain"])
def test_what_two_processes_saved_goes_by_four_to_one(killed, one, target):
    result = one[f"killed, then four -> {target}"]
    assert result["saved"] == killed["killed"]["saved"]
    assert result["losses"] == pytest.approx(killed["killed"]["losses"], abs=1e-6)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("strategy", ["HYBRID_SHARD", "HYBRID_SHARD_ZERO2"])
def test_two_groups_of_two_give_the_losses_of_ddp_over_four(four, version, strategy):
    assert len(four) == 4
    for rank in four:
        for hand in ("ddp", "fsdp2"):
            assert rank["parity"][f"{version} {strategy}"] == pytest.approx(rank["parity"][hand], abs=1e-6)
