"""How a run that was killed goes on: what it was told to go on from, and how far it had come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchport import envvars
from torchport.checkpoint.target import MANIFEST
from torchport.config.kwargs import ProjectConfiguration
from torchport.errors import CheckpointError, ConfigurationError

AUTO = "auto"
"""Go on from the newest complete checkpoint of the project, if there is one."""


class Progress:
    """Counters of a run that checkpoints hold, such as the epoch: plain values, by the names you choose.

    Register it with `Accelerator.register_for_checkpointing`.

    Args:
        **values: Names and first values.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def state_dict(self) -> dict[str, Any]:
        """Return all values by name."""
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over values; names that a checkpoint does not have keep theirs."""
        self.__dict__.update(state_dict)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this Progress has no {name!r}: it was made with {', '.join(self.__dict__) or 'nothing'}"
        )

    def __repr__(self) -> str:
        return f"Progress({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def what_to_resume(asked: str | os.PathLike[str] | None, project: ProjectConfiguration, *, own: bool) -> str:
    """Return what a run is to go on from: `"auto"`, a folder, or nothing.

    Args:
        asked: The argument; `None` takes `TORCHPORT_RESUME`.
        project: The project's configuration; `"auto"` switches automatic naming on if the script left it open.
        own: Whether the script gave a configuration of its own.

    Raises:
        ConfigurationError: if it is neither a folder nor `"auto"`, or if it is `"auto"`, and checkpoints have no folder
            or no numbers.
        CheckpointError: if there is no checkpoint in the folder.
    """
    if isinstance(asked, bool):
        raise ConfigurationError(
            f"resume={asked} is no checkpoint", hint="resume='auto', or the folder of one"
        )
    source = "resume='auto'" if asked is not None else f"{envvars.RESUME}=auto"
    value = os.environ.get(envvars.RESUME, "") if asked is None else os.fspath(asked)
    if value != AUTO:
        if value and not Path(value, MANIFEST).is_file():
            raise CheckpointError(
                f"there is no complete checkpoint to go on from in {value}",
                found=f"no {MANIFEST}" if Path(value).is_dir() else "no such folder",
                reason=f"asked for by {'the argument resume' if asked is not None else envvars.RESUME}",
            )
        return value
    if project.project_dir is None:
        raise ConfigurationError(
            f"{source} needs a folder in which to look for checkpoints",
            hint="Accelerator(project_dir='run', ...)",
        )
    if own and not project.automatic_checkpoint_naming:
        raise ConfigurationError(
            f"{source} needs numbered checkpoints",
            found="ProjectConfiguration(automatic_checkpoint_naming=False)",
            hint="ProjectConfiguration(automatic_checkpoint_naming=True, ...)",
        )
    project.automatic_checkpoint_naming = True
    return AUTO
