"""Training on the real torch_xla gives what plain PyTorch on the CPU gives, on one device and spread over two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchport.errors import LaunchError
from torchport.plugin import Topology

WORKERS = Path(__file__).parents[1] / "workers"
BIN = Path(sys.executable).parent
CASES = {
    "one": {},
    "fsdp": {"STRATEGY": "spmd", "CPU_NUM_DEVICES": "2"},
    "data": {"STRATEGY": "spmd", "CPU_NUM_DEVICES": "2", "SPMD_SHARDING": "data"},
}
ROWS, COLUMNS, VECTOR = "{devices=[2,1]0,1}", "{devices=[1,2]0,1}", "{devices=[2]0,1}"


def run(command: list[str], folder: Path, **environ: str) -> dict:
    done = subprocess.run(
        [*command, str(folder)],
        env={**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module", params=CASES)
def result(request, folder):
    """What a run of the worker wrote, and the name of the case."""
    own = folder / request.param
    own.mkdir()
    return request.param, run([sys.executable, str(WORKERS / "train.py")], own, **CASES[request.param])


def test_losses_are_those_of_pytorch_on_the_cpu(result):
    _, found = result
    assert found["pairs"]["losses"] == pytest.approx(found["hand"], rel=1e-5)
    assert found["stream"]["losses"] == pytest.approx(found["hand"], rel=1e-5)
    assert len(set(found["hand"])) == 12


def test_reading_ahead_changes_neither_the_end_of_an_epoch_nor_the_type_of_a_batch(result):
    _, found = result
    assert (found["pairs"]["ends"], found["stream"]["ends"]) == ([5, 11], [5, 11])
    assert (found["pairs"]["kinds"], found["stream"]["kinds"]) == (["Pair"], ["list"])
    assert found["pairs"]["device"] == "xla:0"
    assert found["pairs"]["read_ahead"] == "XlaBackend.read_ahead"


def test_an_error_of_the_data_set_reaches_the_loop(result):
    assert result[1]["error"] == "sample 13 cannot be read"


def test_tied_weights_stay_tied(result):
    assert result[1]["tied"] is True


def test_batches_parameters_and_optimizer_states_are_spread_as_asked(result):
    case, found = result
    spread = found["pairs"]["shardings"]
    if case == "one":
        assert spread["inputs"] == spread["state"] == ""
    else:
        assert spread["inputs"] == found["stream"]["shardings"]["inputs"] == ROWS
        assert found["pairs"]["plan"] == ["xla", "spmd", "XLA"]
    if case == "fsdp":
        wanted = {"encode.weight": ROWS, "decode.weight": COLUMNS, "decode.bias": VECTOR}
        assert spread["parameters"] == wanted
        assert spread["state"] == ROWS
    elif case == "data":
        assert not {"{devices", ROWS} & set(spread["parameters"].values())
        assert all("devices" not in text for text in spread["parameters"].values())


def test_a_checkpoint_holds_whole_weights_that_the_cpu_reads(result, folder):
    from safetensors.torch import load_file

    case, found = result
    saved = load_file(folder / case / "checkpoint" / "model.safetensors")
    assert saved["encode.weight"].shape == (8, 6)
    for name, values in found["pairs"]["weights"].items():
        assert saved[name].flatten().tolist() == values
    optimizer = torch.load(folder / case / "checkpoint" / "optimizer.bin", weights_only=True)
    assert optimizer["state"][0]["exp_avg"].device.type == "cpu"
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """One process of torch_xla.launch, with float32 held as bfloat16."""
    command = [
        str(BIN / "torchport"),
        "launch",
        "--backend",
        "xla",
        "--launcher",
        "xla",
        "--num-processes",
        "1",
    ]
    options = ["--downcast-bf16", "true", str(WORKERS / "features.py")]
    return run([*command, *options], tmp_path_factory.mktemp("features"))


def test_the_launcher_runs_the_script_in_a_process_of_torch_xla(features):
    assert features["place"] == ["0", "1", "0", "1"]
    assert features["runtime_rank"] == "0"


def test_downcast_holds_float32_as_bfloat16_and_float64_as_float32(features):
    assert features["float32"] == [1.0, "torch.float32"]
    assert features["float64"] == [torch.tensor(1.001).item(), "torch.float64"]


def test_the_collectives_of_one_process_give_back_what_they_were_given(features):
    assert features["collectives"] == {
        "all_reduce": [1.0, 2.0],
        "all_gather": [[1.0, 2.0]],
        "reduce_scatter": [1.0, 2.0],
        "broadcast": [1.0, 2.0],
        "scatter": [3.0, 4.0],
        "objects": [{"rank": 0}],
        "host": [5.0],
    }


def test_a_compiled_model_runs_on_the_device(features):
    assert features["compiled"] == pytest.approx(features["eager"], rel=1e-2)


def test_a_background_checkpoint_is_whole(features):
    assert features["background"] == features["eager_weights"]


def test_spmd_takes_one_process_for_all_devices_of_a_machine():
    from torchport_tpu.spmd import start_process

    with pytest.raises(LaunchError, match="takes one process for all devices of a machine") as refused:
        start_process(Topology(world_size=2, local_world_size=2, source="local"))
    assert refused.value.found == "2 processes on this machine, from local"
