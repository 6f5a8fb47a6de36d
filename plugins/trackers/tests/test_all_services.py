"""The services that `make test-trackers` installs, each in a process of its own: what is logged is what is read back."""

from __future__ import annotations

THREE_PICTURES = ["grey", "samples/0", "samples/1"]


def test_all_at_once(record):
    assert sorted(record("tensorboard", "wandb", "trackio", "comet_ml", "dvclive")) == sorted(
        ["tensorboard", "wandb", "trackio", "comet_ml", "dvclive"]
    )


def test_mlflow(record, flat_config):
    found = record("mlflow")["mlflow"]
    images = found.pop("images")
    assert [
        name.replace("~", "/").replace("#", "/").partition("+")[0].partition("%")[0] for name in images
    ] == THREE_PICTURES
    assert found == {
        "config": {name: str(value) for name, value in flat_config.items()},
        "experiment": "digits",
        "loss": [[0, 0.5], [1, 0.25]],
        "acc": [[0, 0.25]],
        "done": [[1, 1.0]],
        "note": "warm",
        "status": "FINISHED",
        "table": {"columns": ["step", "text", "score"], "data": [[3, "a", 1.5], [3, "b", 2.5]]},
    }


def test_trackio(record, nested_config):
    found = record("trackio")["trackio"]
    assert found["config"] == nested_config
    assert found["rows"][:2] == [
        {"loss": 0.5, "train": {"acc": 0.25}, "note": "warm", "step": 0},
        {"loss": 0.25, "done": True, "step": 1},
    ]
    images, table = found["rows"][2:]
    assert sorted(images) == [*THREE_PICTURES, "step"]
    assert table["scores"]["_value"] == [{"text": "a", "score": 1.5}, {"text": "b", "score": 2.5}]
    assert found["files"] == [".png"] * 3


def test_comet_ml(record, flat_config):
    found = record("comet_ml")["comet_ml"]
    assert found.pop("config").items() >= flat_config.items()
    assert found == {
        "metrics": [["loss", 0, 0.5], ["train/acc", 0, 0.25], ["done", 1, 1], ["loss", 1, 0.25]],
        "note": ["warm"],
        "images": THREE_PICTURES,
        "tables": [["text,score", "a,1.5", "b,2.5"]],
    }


def test_aim(record, nested_config):
    assert record("aim")["aim"] == {
        "name": "digits",
        "config": nested_config,
        "loss": [[0, 0.5], [1, 0.25]],
        "acc": [[0, 0.25]],
        "note": ["warm"],
        "images": {"samples": [[6, 8], [6, 8]], "grey": [[6, 8]]},
    }


def test_clearml(record):
    found = record("clearml")["clearml"]
    (table,) = found.pop("tables")
    assert table["values"] == [["a", "b"], [1.5, 2.5]]
    assert found == {
        "name": "digits",
        "config": 'lr = 0.5\nmodel {\n  layers = 3\n  name = "mlp"\n}\nsizes = [8, 16]\nbias = true',
        "metrics": [
            ["loss", "loss", 0, 0.5],
            ["train", "acc", 0, 0.25],
            ["loss", "loss", 1, 0.25],
            ["done", "done", 1, 1.0],
        ],
        "images": THREE_PICTURES,
        "note": True,
    }


def test_dvclive(record, flat_config):
    assert record("dvclive")["dvclive"] == {
        "config": flat_config,
        "summary": {"loss": 0.25, "train": {"acc": 0.25}, "note": "warm", "step": 1, "done": True},
        "loss": ["step\tloss", "0\t0.5", "1\t0.25"],
        "acc": ["step\tacc", "0\t0.25"],
        "images": ["grey/2.png", "samples/0/2.png", "samples/1/2.png"],
        "table": ["text,score", "a,1.5", "b,2.5"],
    }


def test_swanlab(record, nested_config):
    assert record("swanlab")["swanlab"] == {
        "config": nested_config,
        "metrics": [["done", 1, 1.0], ["loss", 0, 0.5], ["loss", 1, 0.25], ["train/acc", 0, 0.25]],
        "media": [
            ["grey", 2, [".png"]],
            ["note", 0, [".txt"]],
            ["samples", 2, [".png", ".png"]],
            ["scores", 3, [".json"]],
        ],
        "table": [{"text": "a", "score": 1.5}, {"text": "b", "score": 2.5}],
    }
