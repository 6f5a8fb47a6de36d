"""What is logged is what the service's own files say, read back by its own means; nothing here is a stand-in."""

from __future__ import annotations

import pytest
from torchport.errors import UnavailableError
from torchport.plan.discovery import discover
from torchport.tracking import GeneralTracker

SERVICES = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
CLASSES = {
    "aim": "AimTracker",
    "clearml": "ClearMLTracker",
    "comet_ml": "CometMLTracker",
    "dvclive": "DVCLiveTracker",
    "mlflow": "MLflowTracker",
    "swanlab": "SwanLabTracker",
    "tensorboard": "TensorBoardTracker",
    "trackio": "TrackioTracker",
    "wandb": "WandBTracker",
}


@pytest.fixture(scope="module")
def light(record) -> dict:
    """The light ones, both at once."""
    return record("tensorboard", "wandb")


def test_what_must_be_installed_is(expected_services):
    installed = discover({})
    specs = {spec.name: spec for spec in installed.specs("tracker")}
    reasons = {name: installed.probe(specs[name]).reason for name in expected_services}
    assert {name: reason for name, reason in reasons.items() if reason} == {}


@pytest.mark.multiprocess
def test_tensorboard(light, flat_config):
    assert light["tensorboard"] == {
        "config": flat_config,
        "loss": [[0, 0.5], [1, 0.25]],
        "done": [[1, 1.0]],
        "acc": [[0, 0.25]],
        "note": ["warm"],
        "table": ["| text | score |\n| --- | --- |\n| a | 1.5 |\n| b | 2.5 |"],
        "images": {name: [[2, 6, 8]] for name in ("grey", "samples/0", "samples/1")},
    }


@pytest.mark.multiprocess
def test_wandb(light, nested_config):
    found = light["wandb"]
    assert found["config"] == nested_config
    assert found["history"][:2] == [
        {"_step": 0, "loss": 0.5, "train/acc": 0.25, "note": "warm"},
        {"_step": 1, "loss": 0.25, "done": True},
    ]
    images, table = found["history"][2:]
    assert {name: images[name] for name in ("_step", "samples/count", "samples/width", "samples/height")} == {
        "_step": 2,
        "samples/count": 2,
        "samples/width": 6,
        "samples/height": 8,
    }
    assert (table["_step"], table["scores/nrows"]) == (3, 2)
    assert found["tables"] == [{"columns": ["text", "score"], "data": [["a", 1.5], ["b", 2.5]]}]
    assert found["images"] == 3


@pytest.mark.parametrize("name", SERVICES)
def test_the_documented_class_is_there_whether_or_not_the_service_is(name, tmp_path):
    from torchport import tracking

    kind = getattr(tracking, CLASSES[name])
    assert issubclass(kind, GeneralTracker)
    assert kind.name == name
    installed = discover({})
    (spec,) = (spec for spec in installed.specs("tracker") if spec.name == name)
    assert (spec.requires_logging_directory, spec.main_process_only) == (
        kind.requires_logging_directory,
        kind.main_process_only,
    )
    if not installed.probe(spec).available:
        arguments = ("run", str(tmp_path)) if kind.requires_logging_directory else ("run",)
        with pytest.raises(UnavailableError, match=rf"pip install 'torchport-trackers\[{name}\]'"):
            kind(*arguments)
