"""Metrics reach the trackers of the plan, and a tracker that fails does not stop the training."""

import json

import pytest
import torch
from torchport import Accelerator
from torchport.errors import ConfigurationError, UnknownPluginError
from torchport.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_metrics_are_lines_of_json_as_soon_as_they_are_logged(tmp_path):
    accelerator = Accelerator(log_with="jsonl", project_dir=tmp_path)
    accelerator.init_trackers("run", config={"lr": 0.1})
    accelerator.log({"loss": torch.tensor(0.5)}, step=3)
    first, second = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert first["config"] == {"lr": 0.1}
    assert (second["step"], second["loss"]) == (3, 0.5)
    assert accelerator.get_tracker("jsonl", unwrap=True) == tmp_path / "run.jsonl"
    accelerator.end_training()
    assert accelerator.trackers == []


def test_the_variable_chooses_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHPORT_TRACKERS", "jsonl")
    accelerator = Accelerator(project_dir=tmp_path)
    accelerator.init_trackers("run")
    assert [tracker.spec.name for tracker in accelerator.trackers] == ["jsonl"]


def test_a_tracker_that_fails_is_reported_once(tmp_path, capsys):
    accelerator = Accelerator(log_with=["jsonl"], project_dir=tmp_path)
    accelerator.init_trackers("run")
    accelerator.get_tracker("jsonl").close()
    accelerator.log({"loss": 1.0})
    accelerator.log({"loss": 1.0})
    assert capsys.readouterr().err.count("tracker 'jsonl' failed, and training goes on") == 1


def test_trackers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UnknownPluginError, match="pip install torchport-wandb"):
        Accelerator(log_with="wandb")
    accelerator = Accelerator(project_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="TORCHPORT_TRACKERS=jsonl"):
        accelerator.get_tracker("jsonl")
    with pytest.raises(ConfigurationError, match="has arguments for wandb"):
        accelerator.init_trackers("run", init_kwargs={"wandb": {}})
