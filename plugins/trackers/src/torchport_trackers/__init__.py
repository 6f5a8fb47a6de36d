"""Experiment trackers: descriptors only; imports no service's package."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin import TrackerSpec, hookimpl


@hookimpl
def torchport_trackers() -> Iterable[TrackerSpec]:
    """Offer one tracker for each service; its module is imported when it has been chosen."""
    yield TrackerSpec(
        name="tensorboard",
        factory="torchport_trackers.tensorboard:TensorBoardTracker",
        summary="event files for TensorBoard",
        runtime=("tensorboard>=2.12",),
        requires_logging_directory=True,
    )
    yield TrackerSpec(
        name="wandb",
        factory="torchport_trackers.wandb:WandBTracker",
        summary="Weights & Biases, online or offline",
        runtime=("wandb>=0.16",),
    )
    yield TrackerSpec(
        name="mlflow",
        factory="torchport_trackers.mlflow:MLflowTracker",
        summary="an MLflow server, database or folder",
        runtime=("mlflow>=2.11",),
    )
    yield TrackerSpec(
        name="trackio",
        factory="torchport_trackers.trackio:TrackioTracker",
        summary="Trackio's local database, or a Space",
        runtime=("trackio>=0.5",),
    )
    yield TrackerSpec(
        name="comet_ml",
        factory="torchport_trackers.comet_ml:CometMLTracker",
        summary="Comet, online or offline",
        runtime=("comet_ml>=3.40",),
    )
    yield TrackerSpec(
        name="aim",
        factory="torchport_trackers.aim:AimTracker",
        summary="an Aim repository",
        runtime=("aim>=3.17",),
        requires_logging_directory=True,
    )
    yield TrackerSpec(
        name="clearml",
        factory="torchport_trackers.clearml:ClearMLTracker",
        summary="ClearML, online or offline",
        runtime=("clearml>=1.14",),
    )
    yield TrackerSpec(
        name="dvclive",
        factory="torchport_trackers.dvclive:DVCLiveTracker",
        summary="DVCLive's files, for DVC",
        runtime=("dvclive>=3.0",),
    )
    yield TrackerSpec(
        name="swanlab",
        factory="torchport_trackers.swanlab:SwanLabTracker",
        summary="SwanLab, in the cloud, local or offline",
        runtime=("swanlab>=0.6",),
    )
