"""The checkpoints of a project: where they go, what they are called, and how a run goes on from one."""

from __future__ import annotations

import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchport.checkpoint import state
from torchport.checkpoint.agreement import Agreement
from torchport.checkpoint.atomic import saved_at
from torchport.checkpoint.background import BackgroundSave, StoreExchange, own_client
from torchport.checkpoint.reshard import scheduler_facts
from torchport.checkpoint.resume import AUTO
from torchport.checkpoint.snapshot import HostBuffers
from torchport.checkpoint.target import MANIFEST, refuse_foreign, resolve
from torchport.checkpoint.work import WorkFolder, remove
from torchport.config.kwargs import ProjectConfiguration
from torchport.errors import CheckpointError, ConfigurationError
from torchport.plan.selection import Plan
from torchport.process_control import ProcessControl

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Checkpoints:
    """The checkpoints of a project.

    Attributes:
        contents: The objects whose state they hold.
        project: The project's configuration.
        save_hooks: Called in each save before weights are written, as `hook(models, weights, output_dir)`.
        load_hooks: Called in each load before weights are loaded, as `hook(models, input_dir)`.
        resumed_from: The checkpoint that the run goes on from; `None` in a run that began anew.

    Args:
        contents: The objects whose state they hold.
        project: The project's configuration.
        processes: The processes of the job.
        resume: What to go on from: `"auto"`, a folder, or nothing.
        on_load: Called when a checkpoint has been loaded.
    """

    def __init__(
        self,
        contents: state.Contents,
        project: ProjectConfiguration,
        processes: ProcessControl,
        resume: str = "",
        on_load: Callable[[], None] | None = None,
    ) -> None:
        self.contents = contents
        self.project = project
        self.processes = processes
        self.save_hooks: list[Callable[..., Any]] = []
        self.load_hooks: list[Callable[..., Any]] = []
        self.resumed_from: str | None = None
        self._resume = resume
        self._on_load = on_load
        runtime = contents.runtime
        self._buffers = HostBuffers(runtime.backend, runtime.device)
        self._running: BackgroundSave | None = None
        self._client: Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what all processes (of its machine) share."""
        everywhere = self.project.save_on_each_node
        return self.processes.is_local_main_process if everywhere else self.processes.is_main_process

    @property
    def folder(self) -> Path:
        """Where numbered checkpoints are."""
        return Path(self.project.project_dir or ".") / "checkpoints"

    def save(
        self,
        output_dir: str | os.PathLike[str] | None,
        safe_serialization: bool,
        plan: Plan,
        blocking: bool = True,
    ) -> Path:
        """Write a checkpoint and, with automatic naming, delete the oldest beyond the limit."""
        self.contents.runtime.check_open("save_state()")
        named = self._named(output_dir)
        self.contents.strategy.begin_save()
        agreement = Agreement(f"the checkpoint {named} could not be saved", lambda: _older(named))
        target, token = self._agree_on_target(named, output_dir is None, agreement)
        facts = {
            "plan": plan.fingerprint(),
            "world_size": self.processes.num_processes,
            "objects": state.counts(self.contents),
            **scheduler_facts(self.contents.schedulers, self.contents.loaders),
            "iteration": self.project.iteration,
            "saved_at": time.time(),
            **({"shards": self.contents.strategy.shards} if self.contents.strategy.shards else {}),
        }
        numbered_now = self.project.automatic_checkpoint_naming and output_dir is None
        work = WorkFolder(target, token, self.leads)
        try:
            part = state.gather(
                self.contents,
                work,
                agreement,
                safe_serialization=safe_serialization,
                leader=self.leads,
                hooks=self.save_hooks,
            )
            limit = self.project.total_limit if numbered_now else None
            if blocking:
                self._finish(part, work, target, agreement, facts)
            else:
                agreement.step(lambda: self._prepare_thread(part.files), "copy its state to host memory")
        except BaseException:
            work.close()
            raise
        if numbered_now:
            self.project.iteration += 1
        if blocking:
            self._make_room(target, limit, agreement)
        else:
            self._start(part, work, target, agreement, facts, limit, token)
        return named

    def wait(self) -> None:
        """Wait until the save in the background has ended; raise its error, once."""
        if self._running is None:
            return
        self._running.join()  # may be interrupted: then it is still running
        running, self._running = self._running, None
        running.check()

    def release(self) -> None:
        """Give back the host memory that snapshots were copied into."""
        self._buffers.release()

    def load(self, input_dir: str | os.PathLike[str] | None) -> None:
        """Verify and load a checkpoint: the one given or, with automatic naming, the newest complete one."""
        self.contents.runtime.check_open("load_state()")
        if input_dir is None and not self.project.automatic_checkpoint_naming:
            raise CheckpointError(
                "load_state needs a folder", hint="load_state('folder'), or automatic naming"
            )
        agreement = Agreement(f"the checkpoint {input_dir or self.folder} could not be loaded")
        agreement.step(self.wait)
        if input_dir is None:
            source = self._newest(agreement)
            if source is None:
                raise CheckpointError(
                    f"there is no complete checkpoint in {self.folder}", hint="save_state() writes one"
                )
        else:
            source = Path(input_dir)
        self._load(source, agreement)

    def resume(self) -> str | None:
        """Load the checkpoint that the run was told to go on from; `None` where there is nothing to load."""
        asked, self._resume = self._resume, ""
        if not asked:
            return self.resumed_from
        agreement = Agreement(f"the run could not be resumed from {asked}")
        source = Path(asked)
        if asked == AUTO:
            found = self._newest(agreement)
            if found is None:
                return None
            source = found
        self._load(source, agreement)
        self.resumed_from = str(source)
        return self.resumed_from

    def _load(self, source: Path, agreement: Agreement) -> None:
        manifest = state.load(self.contents, source, agreement, hooks=self.load_hooks)
        if self._on_load is not None:
            self._on_load()
        self._resume = ""
        if self.project.automatic_checkpoint_naming:
            self.project.iteration = int(manifest.get("iteration", -1)) + 1

    def _newest(self, agreement: Agreement) -> Path | None:
        """Return the newest checkpoint that is complete on all machines, the same on every process."""

        def complete() -> list[str] | None:
            return [path.name for path in numbered(self.folder)] if self.leads else None

        lists = [names for names in agreement.step(complete) if names is not None]
        everywhere = [name for name in lists[0] if all(name in names for names in lists)]
        return self.folder / everywhere[-1] if everywhere else None

    def _finish(
        self,
        part: state.Part,
        work: WorkFolder,
        target: Path,
        agreement: Agreement,
        facts: dict[str, Any],
    ) -> None:
        """Write, and complete the checkpoint."""
        rank, shared = self.processes.process_index, not self.project.save_on_each_node
        try:
            state.write(
                part, work, target, agreement, rank=rank, leader=self.leads, shared=shared, facts=facts
            )
        finally:
            work.close()

    def _make_room(self, target: Path, limit: int | None, agreement: Agreement) -> None:
        """Delete the oldest checkpoints beyond the limit, when a new one is complete."""
        if limit is not None:
            Agreement(
                f"the checkpoint {target} has been saved, but older ones are left", gather=agreement.gather
            ).step(lambda: make_room(target, limit) if self.leads else None, "delete them")

    def _prepare_thread(self, files: Sequence[state.File]) -> None:
        """Copy what changes while the thread writes, and connect to the store while all processes are there."""
        if self._client is None:
            self._client = own_client(self.contents.runtime.store)
        copies = self._buffers.snapshot([file.state for file in files])
        for file, copied in zip(files, copies, strict=True):
            file.state = copied

    def _start(
        self,
        part: state.Part,
        work: WorkFolder,
        target: Path,
        agreement: Agreement,
        facts: dict[str, Any],
        limit: int | None,
        token: str,
    ) -> None:
        """Finish in a thread."""
        topology = self.contents.runtime.topology

        def save() -> None:
            with StoreExchange(self._client, token, topology.rank, topology.world_size) as exchange:
                agreement.gather = exchange.gather
                self._finish(part, work, target, agreement, facts)
                self._make_room(target, limit, agreement)
            part.files.clear()

        self._running = BackgroundSave(save, str(target))

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
            self.wait()
            if self._resume:
                raise CheckpointError(
                    f"this run has not gone on from {self._resume!r} as it was told to, and would save a new one",
                    found="save_state() before resume()",
                    hint="accelerator.resume() when everything is prepared and registered, before training",
                )
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
            with suppress(FileNotFoundError):  # somebody deletes it at this moment
                found.append((saved_at(path), int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def _older(named: Path) -> str:
    """Name the complete checkpoint that stays if this one cannot be saved."""
    if (named / MANIFEST).is_file():
        return f"the older checkpoint {named} is still whole"
    complete = numbered(named.parent)
    return f"the newest complete checkpoint is {complete[-1]}" if complete else ""


def make_room(new: Path, limit: int) -> None:
    """Delete the oldest numbered checkpoints beside a new one until `limit` are left; never the new one.

    One that cannot be deleted is warned of: the new one has been saved, and the next save tries again.
    """
    older = [path for path in numbered(new.parent) if path.name != new.name]
    for path in older[: max(0, len(older) + 1 - limit)]:
        try:
            remove(path)
        except OSError as error:
            warnings.warn(
                f"the checkpoint {new} has been saved, but the older one {path} cannot be deleted"
                f" ({type(error).__name__}: {error}): delete it, or save without total_limit",
                stacklevel=2,
            )


class HookHandle:
    """Takes a registered hook out again."""

    def __init__(self, hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._hooks, self._hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        """Take the hook out."""
        self._hooks.remove(self._hook)
