"""Where a project's checkpoints go, what they are called, and what else is called before and in them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchport.checkpoint import state
from torchport.checkpoint.agreement import Agreement
from torchport.checkpoint.target import MANIFEST, refuse_foreign, resolve
from torchport.config.kwargs import ProjectConfiguration
from torchport.errors import CheckpointError, ConfigurationError
from torchport.plan.selection import Plan
from torchport.process_control import ProcessControl


class Checkpoints:
    """The checkpoints of a project.

    Attributes:
        contents: The objects whose state they hold.
        project: The project's configuration.
        save_hooks: Called in each save before weights are written, as `hook(models, weights, output_dir)`.
        load_hooks: Called in each load before weights are loaded, as `hook(models, input_dir)`.
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
        named = self._named(output_dir)
        agreement = Agreement(
            f"the checkpoint {named} could not be saved", "an older checkpoint of that name is still whole"
        )
        target, token = self._agree_on_target(named, output_dir is None, agreement)
        facts = {
            "plan": plan.fingerprint(),
            "world_size": self.processes.num_processes,
            "objects": state.counts(self.contents),
            "iteration": self.project.iteration,
            "saved_at": time.time(),
        }
        state.save(
            self.contents,
            target,
            target.parent / f".{target.name}.writing-{token}",
            agreement,
            safe_serialization=safe_serialization,
            leader=self.leads,
            facts=facts,
            hooks=self.save_hooks,
        )
        if self.project.automatic_checkpoint_naming and output_dir is None:
            self.project.iteration += 1
            limit = self.project.total_limit
            if limit is not None:
                Agreement(f"the checkpoint {named} has been saved, but older ones are left").step(
                    lambda: make_room(target, limit) if self.leads else None, "delete them"
                )
        return named

    def load(self, input_dir: str | os.PathLike[str] | None) -> None:
        """Verify and load a checkpoint: the one given or, with automatic naming, the newest complete one."""
        if input_dir is None and not self.project.automatic_checkpoint_naming:
            raise CheckpointError(
                "load_state needs a folder", hint="load_state('folder'), or automatic naming"
            )
        agreement = Agreement(f"the checkpoint {input_dir or self.folder} could not be loaded")
        if input_dir is None:
            main = self.processes.is_main_process
            source = agreement.step(lambda: newest(self.folder) if main else None)[0]
        else:
            source = Path(input_dir)
        manifest = state.load(self.contents, source, agreement, hooks=self.load_hooks)
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

    def _named(self, output_dir: str | os.PathLike[str] | None) -> Path:
        if output_dir is not None:
            return Path(output_dir).absolute()
        if not self.project.automatic_checkpoint_naming:
            raise CheckpointError(
                "save_state needs a folder",
                hint="save_state('folder'), or ProjectConfiguration(automatic_checkpoint_naming=True)",
            )
        return (self.folder / f"checkpoint_{self.project.iteration}").absolute()

    def _agree_on_target(self, named: Path, automatic: bool, agreement: Agreement) -> tuple[Path, str]:
        """Return the folder to replace and a word for its temporary folder, before anything is written."""

        def check() -> tuple[str, str]:
            target = resolve(named)
            if self.leads and automatic and target.exists():
                raise CheckpointError(
                    f"{target} exists already",
                    reason="automatic naming never overwrites a checkpoint",
                    hint="load_state() before training continues, another project_dir, or a higher `iteration`",
                )
            if self.leads:
                refuse_foreign(target)
            return str(named), secrets.token_hex(4)

        answers = agreement.step(check)
        others = {rank: name for rank, (name, _) in enumerate(answers) if name != answers[0][0]}
        if others and not self.project.save_on_each_node:
            rank = min(others)
            raise CheckpointError(
                "the processes were given different folders for one checkpoint",
                found=f"rank 0: {answers[0][0]}, rank {rank}: {others[rank]}",
                hint="broadcast_object_list([folder])[0] gives all processes the one of rank 0",
            )
        return resolve(named), answers[0][1]


def numbered(folder: Path) -> list[Path]:
    """Return the complete checkpoints among `checkpoint_0`, `checkpoint_1`, …; the one saved last comes last."""
    found = []
    for path in folder.glob("checkpoint_*"):
        match = re.fullmatch(r"checkpoint_(\d+)", path.name)
        if match and (path / MANIFEST).is_file():
            found.append((_saved_at(path), int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def newest(folder: Path) -> Path:
    """Return the newest complete checkpoint of a folder of numbered ones.

    Raises:
        CheckpointError: if there is none.
    """
    complete = numbered(folder)
    if not complete:
        raise CheckpointError(f"there is no complete checkpoint in {folder}", hint="save_state() writes one")
    return complete[-1]


def make_room(new: Path, limit: int) -> None:
    """Delete the oldest numbered checkpoints beside a new one until `limit` are left; never the new one."""
    older = [path for path in numbered(new.parent) if path.name != new.name]
    for path in older[: max(0, len(older) + 1 - limit)]:
        (path / MANIFEST).unlink()  # half deleted, it is no checkpoint
        shutil.rmtree(path)


def _saved_at(folder: Path) -> float:
    """Return when a checkpoint was saved, in seconds since 1970: what its manifest says, or else the file's time."""
    path = folder / MANIFEST
    try:
        return float(json.loads(path.read_text())["saved_at"])
    except (ValueError, KeyError, TypeError):
        return path.stat().st_mtime


class HookHandle:
    """Takes a registered hook out again."""

    def __init__(self, hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._hooks, self._hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        """Take the hook out."""
        self._hooks.remove(self._hook)
