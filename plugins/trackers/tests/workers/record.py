"""Record as a script does, and write down what the services' own files say then: SERVICE,SERVICE,... FOLDER."""

import contextlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torchport import Accelerator
from wandb_file import wandb_records

PROJECT = "digits"
CONFIG = {"lr": 0.5, "model": {"layers": 3, "name": "mlp"}, "sizes": [8, 16], "bias": True}
IMAGES = np.zeros((2, 8, 6, 3), dtype=np.uint8)
IMAGES[0, :, :, 0] = 255
COLUMNS, ROWS = ["text", "score"], [["a", 1.5], ["b", 2.5]]

ENVIRON = {
    "wandb": {"WANDB_MODE": "offline"},
    "clearml": {"CLEARML_OFFLINE_MODE": "1", "CLEARML__SDK__DEVELOPMENT__REPORT_USE_SUBPROCESS": "0"},
    "trackio": {"TRACKIO_DIR": "trackio"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
    "aim": {"AIM_UI_TELEMETRY_ENABLED": "0"},
}
OPTIONS = {
    "comet_ml": {"online": False},
    "swanlab": {"mode": "offline", "log_dir": "swanlog"},
    "dvclive": {"save_dvc_exp": False, "dvcyaml": False},
    "trackio": {"name": "first"},
    "clearml": {"auto_connect_frameworks": False, "auto_resource_monitoring": False},
}


def record(services: list[str]) -> dict[str, str]:
    """Train nothing and record everything; return what identifies the run of each service."""
    accelerator = Accelerator(log_with=services, project_dir=".")
    options = {name: OPTIONS[name] for name in services if name in OPTIONS}
    accelerator.init_trackers(PROJECT, config=CONFIG, init_kwargs=options, strict=True)
    accelerator.log({"loss": torch.tensor(0.5), "train": {"acc": np.float32(0.25)}, "note": "warm"}, step=0)
    accelerator.log({"loss": 0.25, "done": torch.tensor([True])}, step=1)
    accelerator.log_images({"samples": IMAGES, "grey": [np.linspace(0, 1, 48).reshape(8, 6)]}, step=2)
    accelerator.log_table("scores", COLUMNS, ROWS, step=3)
    found = {name: identify(name, accelerator.get_tracker(name)) for name in services}
    accelerator.end_training()
    return found


def identify(service, tracker) -> str:
    run = tracker.tracker
    assert run is not None
    return {
        "aim": lambda: run.hash,
        "mlflow": lambda: run.info.run_id,
        "wandb": lambda: run.settings.sync_file,
        "clearml": lambda: str(run.get_offline_mode_folder()),
        "comet_ml": lambda: run.get_key(),
        "swanlab": lambda: str(run.dir),
    }.get(service, lambda: "")()


# --- reading back, by each service's own means ---


def read_tensorboard(_: str) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(PROJECT)
    events.Reload()
    (plugin,) = [
        events.summary_metadata[tag].plugin_data.content
        for tag in events.summary_metadata
        if tag == "_hparams_/session_start_info"
    ]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData.FromString(plugin).session_start_info.hparams
    extra = EventAccumulator(f"{PROJECT}/train_acc")
    extra.Reload()
    return {
        "config": {name: getattr(value, value.WhichOneof("kind")) for name, value in data.items()},
        "loss": [[e.step, e.value] for e in events.Scalars("loss")],
        "done": [[e.step, e.value] for e in events.Scalars("done")],
        "acc": [[e.step, e.value] for e in extra.Scalars("train")],
        "note": [e.tensor_proto.string_val[0].decode() for e in events.Tensors("note/text_summary")],
        "table": [e.tensor_proto.string_val[0].decode() for e in events.Tensors("scores/text_summary")],
        "images": {
            tag: [[e.step, e.width, e.height] for e in events.Images(tag)] for tag in events.Tags()["images"]
        },
    }


def read_wandb(sync_file: str) -> dict:
    config, history = {}, []
    for found in wandb_records(sync_file):
        for item in (*found.run.config.update, *found.config.update):
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.history.item
        }
        history += [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")}] if row else []
    config.pop("_wandb", None)
    folder = Path(sync_file).parent / "files"
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    return {
        "config": config,
        "history": history,
        "tables": tables,
        "images": len(list(folder.rglob("*.png"))),
    }


def read_mlflow(run_id: str) -> dict:
    import mlflow

    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    with contextlib.redirect_stdout(sys.stderr), contextlib.redirect_stderr(open(os.devnull, "w")):
        table = client.download_artifacts(run_id, "scores.json", ".")
    return {
        "config": run.data.params,
        "experiment": client.get_experiment(run.info.experiment_id).name,
        "loss": [[m.step, m.value] for m in client.get_metric_history(run_id, "loss")],
        "acc": [[m.step, m.value] for m in client.get_metric_history(run_id, "train/acc")],
        "done": [[m.step, m.value] for m in client.get_metric_history(run_id, "done")],
        "note": run.data.tags["note"],
        "status": run.info.status,
        "images": sorted(
            Path(item.path).name.partition("%step")[0]
            for item in client.list_artifacts(run_id, "images")
            if item.path.endswith(".png")
        ),
        "table": json.loads(Path(table).read_text()),
    }


def read_trackio(_: str) -> dict:
    from trackio.sqlite_storage import SQLiteStorage

    config = SQLiteStorage.get_run_config(PROJECT, "first")
    rows = SQLiteStorage.get_logs(PROJECT, "first")
    return {
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "rows": [{name: value for name, value in row.items() if name != "timestamp"} for row in rows],
        "files": sorted(path.suffix for path in Path("trackio/media").rglob("*.*")),
    }


def read_comet_ml(_: str) -> dict:
    (archive,) = Path(".cometml-runs").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").decode().splitlines()]
        uploads = [m["payload"] for m in messages if m["type"] == "file_upload"]
        tables = [
            file.read(item["file_path"]).decode().splitlines()
            for item in uploads
            if item["additional_params"].get("fileName") == "scores.csv"
        ]
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    params = [m["payload"]["param"] for m in messages if m["type"] == "parameter_msg"]
    return {
        "config": {p["paramName"]: p["paramValue"] for p in params if p["source"] == "manual"},
        "metrics": [
            [m["metricName"], m["step"], m["metricValue"]]
            for m in metrics
            if not m["metricName"].startswith(("sys.", "process"))
        ],
        "note": [m["payload"]["value"] for m in messages if m["payload"].get("key") == "note"],
        "images": sorted(
            item["additional_params"]["figName"] for item in uploads if "figName" in item["additional_params"]
        ),
        "tables": tables,
    }


def read_aim(run_hash: str) -> dict:
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    repo, anywhere = Repo.from_path("."), Context({})
    RepoIndexManager.get_index_manager(repo).index(run_hash)  # as `aim up` does
    run = repo.get_run(run_hash)

    def images(name: str) -> list:
        (values,) = run.get_image_sequence(name, anywhere).values.values_list()
        return [list(image.size) for image in (values if isinstance(values, (list, tuple)) else [values])]

    def metric(name: str) -> list:
        frame = run.get_metric(name, anywhere).dataframe()
        return [[int(step), value] for step, value in zip(frame["step"], frame["value"], strict=True)]

    return {
        "name": run.name,
        "config": run["hparams"],
        "loss": metric("loss"),
        "acc": metric("train/acc"),
        "note": [text.data for text in run.get_text_sequence("note", anywhere).values.values_list()],
        "images": {name: images(name) for name in ("samples", "grey")},
    }


def read_clearml(folder: str) -> dict:
    with zipfile.ZipFile(f"{folder}.zip") as file:
        task = json.loads(file.read("task.json"))
        lines = {
            kind: [
                event
                for name in file.namelist()
                if Path(name).name == kind
                for line in file.read(name).decode().splitlines()
                for event in json.loads(line)
            ]
            for kind in ("metrics.jsonl", "log.jsonl")
        }
    events = lines["metrics.jsonl"]
    scalars = [e for e in events if e["type"] == "training_stats_scalar"]
    return {
        "name": task["name"],
        "config": task["configuration"]["General"]["value"],
        "metrics": [[e["metric"], e["variant"], e["iter"], e["value"]] for e in scalars],
        "images": sorted(e["variant"] for e in events if e["type"] == "training_debug_image"),
        "tables": [json.loads(e["plot_str"])["data"][0]["cells"] for e in events if e["type"] == "plot"],
        "note": any("note at 0: warm" in event["msg"] for event in lines["log.jsonl"]),
    }


def read_dvclive(_: str) -> dict:
    import yaml

    folder = Path("dvclive")
    return {
        "config": yaml.safe_load((folder / "params.yaml").read_text()),
        "summary": json.loads((folder / "metrics.json").read_text()),
        "loss": (folder / "plots/metrics/loss.tsv").read_text().splitlines(),
        "acc": (folder / "plots/metrics/train/acc.tsv").read_text().splitlines(),
        "images": sorted(str(p.relative_to(folder / "plots/images")) for p in folder.rglob("*.png")),
        "table": (folder / "artifacts/scores-3.csv").read_text().splitlines(),
    }


def read_swanlab(folder: str) -> dict:
    import yaml
    from swanlab.proto.swanlab.record.v1 import record_pb2
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    config = yaml.safe_load((Path(folder) / "files/config.yaml").read_text())
    reader, numbers, media = DataStoreReader(), [], []
    reader.open(*Path(folder).glob("run-*.swanlab"))
    for data in reader:
        found = record_pb2.Record.FromString(data)
        if found.WhichOneof("record_type") == "scalar":
            numbers.append([found.scalar.key, found.scalar.step, found.scalar.value.number])
        elif found.WhichOneof("record_type") == "media":
            kinds = [Path(item.filename).suffix for item in found.media.value.items]
            media.append([found.media.key, found.media.step, kinds])
    (table,) = Path(folder).glob("media/*/*.json")
    return {
        "config": {name: item["value"] for name, item in config.items()},
        "metrics": sorted(numbers),
        "media": sorted(media),
        "table": json.loads(table.read_text())["rowData"],
    }


if __name__ == "__main__":
    names, folder = sys.argv[1].split(","), sys.argv[2]
    os.chdir(folder)
    for name in names:
        os.environ.update(ENVIRON.get(name, {}))
    runs = record(names)
    answers = {name: globals()[f"read_{name}"](run) for name, run in runs.items()}
    Path("answers.json").write_text(json.dumps(answers, default=str))
