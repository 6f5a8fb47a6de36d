"""Where a project's checkpoints go, what they are called, and what else is called before and in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchport.checkpoint import state
from torchport.config.kwargs import ProjectConfiguration
from torchport.errors import CheckpointError, ConfigurationError
from torchport.plan.selection import Plan
from torchport.process_control import ProcessControl


class Checkpoints:
    """The checkpoints of a project.

    Attributes:
        contents: The objects whose state they hold.
        project: The project's configuration.
        save_hooks: Called before each save, as `hook(models, weights, output_dir)`.
        load_hooks: Called before each load, as `hook(models, input_dir)`.
    """

    def __init__(
        self, contents: state.Contents, project: ProjectConfiguration, processes: ProcessControl
    ) -> None:
        self.contents = contents
        self.project = project
        self.processes = processes
        self.save_hooks: list[Callable[..., Any]] = []
        self.load_hooks: list[Callable[..., Any]] = []

    @property
    def leads(self) -> bool:
        """Whether this process writes what all processes (of its machine) share."""
        everywhere = self.project.save_on_each_node
        return self.processes.is_local_main_process if everywhere else self.processes.is_main_process

    @property
    def folder(self) -> Path:
        """Where numbered checkpoints are."""
        return Path(self.project.project_dir or ".") / "checkpoints"

    def save(self, output_dir: str | os.PathLike[str] | None, safe_serialization: bool, plan: Plan) -> Path:
        """Write a checkpoint and, with automatic naming, delete the oldest beyond the limit."""
        target = self._target(output_dir)
        for hook in self.save_hooks:
            hook(self.contents.models, [], str(target))
        facts = {
            "plan": plan.fingerprint(),
            "world_size": self.processes.num_processes,
            "objects": state.counts(self.contents),
            "iteration": self.project.iteration,
        }
        state.save(
            self.contents, target, safe_serialization=safe_serialization, leader=self.leads, facts=facts
        )
        if self.project.automatic_checkpoint_naming and output_dir is None:
            if self.leads and self.project.total_limit is not None:
                state.make_room(target.parent, self.project.total_limit)
            self.project.iteration += 1
        return target

    def load(self, input_dir: str | os.PathLike[str] | None) -> None:
        """Verify and load a checkpoint: the one given or, with automatic naming, the newest complete one."""
        if input_dir is None and not self.project.automatic_checkpoint_naming:
            raise CheckpointError(
                "load_state needs a folder", hint="load_state('folder'), or automatic naming"
            )
        source = state.newest(self.folder) if input_dir is None else Path(input_dir)
        for hook in self.load_hooks:
            hook(self.contents.models, str(source))
        manifest = state.load(self.contents, source)
        if self.project.automatic_checkpoint_naming:
            self.project.iteration = int(manifest.get("iteration", -1)) + 1

    def register(self, *objects: Any) -> None:
        """Hold further objects.

        Raises:
            ConfigurationError: if one has no `state_dict` or no `load_state_dict`.
        """
        for thing in objects:
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise ConfigurationError(
                    f"a {type(thing).__name__} cannot be registered for checkpoints",
                    reason="it has no state_dict() or no load_state_dict()",
                )
        self.contents.custom.extend(objects)

    def _target(self, output_dir: str | os.PathLike[str] | None) -> Path:
        if output_dir is not None:
            return Path(output_dir).absolute()
        if not self.project.automatic_checkpoint_naming:
            raise CheckpointError(
                "save_state needs a folder",
                hint="save_state('folder'), or ProjectConfiguration(automatic_checkpoint_naming=True)",
            )
        target = (self.folder / f"checkpoint_{self.project.iteration}").absolute()
        if target.exists():
            raise CheckpointError(
                f"{target} exists already",
                reason="automatic naming never overwrites a checkpoint",
                hint="load_state() before training continues, another project_dir, or a higher `iteration`",
            )
        return target


class HookHandle:
    """Takes a registered hook out again."""

    def __init__(self, hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._hooks, self._hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        """Take the hook out."""
        self._hooks.remove(self._hook)
