"""Saving and loading: the methods of `Accelerator` that keep a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchport.checkpoint.model_folder import save_model
from torchport.checkpoint.project import Checkpoints, HookHandle
from torchport.checkpoint.state import Contents
from torchport.checkpoint.weights import model_state, save_object, save_weights
from torchport.config.kwargs import ProjectConfiguration


class CheckpointControl:
    """Save, load and resume; the class that mixes it in has what is declared here."""

    project_configuration: ProjectConfiguration
    _contents: Contents
    _checkpoints: Checkpoints

    @property
    def save_iteration(self) -> int:
        """Number of the next checkpoint under automatic naming."""
        return self.project_configuration.iteration

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        blocking: bool = True,
    ) -> str:
        """Save everything prepared and registered; call it on every process.

        The folder appears when it is complete, or not at all: a crash leaves the previous one whole. States are
        tensors and plain values; NumPy's scalars become Python's, and its arrays tensors.

        Args:
            output_dir: A folder of its own, the same on every process: new, empty, or an older checkpoint, which
                is replaced as a whole. With automatic naming, leave it out.
            safe_serialization: Whether weights are written as safetensors.
            blocking: Whether to return when the checkpoint is on the disk. If not, this returns when the state has
                been copied to host memory (as much as the files of this process hold), and a thread writes; the next
                save waits for it. An error is raised by the next `save_state` or `load_state`, by
                `wait_for_checkpoint` or `end_training`, or printed when the program ends, with the exit code 120.

        Returns:
            The folder.

        Raises:
            CheckpointError: on every process, if any could not write its part, if a state could not be loaded
                again, or if the folder holds anything else than a checkpoint.
            OperationError: if a run of several processes has ended.
        """
        return str(
            self._checkpoints.save(output_dir, safe_serialization, self._contents.runtime.plan, blocking)
        )

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint of `save_state(blocking=False)` is on the disk.

        Raises:
            CheckpointError: if it could not be saved.
        """
        self._checkpoints.wait()

    def load_state(self, input_dir: str | os.PathLike[str] | None = None) -> None:
        """Load what `save_state` saved, after verifying it; call it on every process.

        Gradients of prepared optimizers are cleared, and the next micro-batch begins an accumulation window.

        Args:
            input_dir: The folder; with automatic naming, left out, the newest complete one.

        Raises:
            CheckpointError: on every process, if it is incomplete, damaged, or was made of other objects, or if any
                process could not load it.
            OperationError: if a run of several processes has ended.
        """
        self._checkpoints.load(input_dir)

    def resume(self) -> str | None:
        """Load the checkpoint that this run goes on from, if there is one; call it on every process.

        Call it once everything is prepared and registered, before training.

        Returns:
            The checkpoint's folder; `None` in a run that begins anew.

        Raises:
            CheckpointError: as `load_state`.
        """
        return self._checkpoints.resume()

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint that `resume` has loaded."""
        return self._checkpoints.resumed_from

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load further objects, which have `state_dict` and `load_state_dict`.

        Args:
            *objects: The objects. `state_dict` is called on every process, and the state of the main one is saved.

        Raises:
            ConfigurationError: if one lacks these methods.
        """
        self._checkpoints.register(*objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook on every process in each `save_state`, before weights are written.

        Args:
            hook: Called as `hook(models, weights, output_dir)` with the prepared models, the list of their state
                dicts, and the folder that is being written: files it writes there become part of the checkpoint.
                States that it takes out of `weights` are not written.

        Returns:
            A handle whose `remove()` takes the hook out.
        """
        return HookHandle(self._checkpoints.save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook on every process in each `load_state`, after verification and before weights are loaded.

        Args:
            hook: Called as `hook(models, input_dir)` with a list of the prepared models and the checkpoint's folder.
                Models that it takes out of the list are not loaded: it has loaded them itself.

        Returns:
            A handle whose `remove()` takes the hook out.
        """
        return HookHandle(self._checkpoints.load_hooks, hook)

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Return the whole state of a prepared model; call it on every process."""
        return model_state(self._contents.strategy, model) if unwrap else model.state_dict()

    def save(self, obj: Any, f: str | os.PathLike[str], safe_serialization: bool = False) -> None:
        """Write an object on the main process, with `torch.save` or (tensors by name) as safetensors.

        Raises:
            CheckpointError: on the main process, if the file cannot be written.
        """
        if self._checkpoints.leads:
            backend = self._contents.runtime.backend
            save_object(obj, Path(f), save_weights if safe_serialization else backend.save)

    def save_model(
        self,
        model: torch.nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the weights of a prepared model for other programs; call it on every process.

        Args:
            model: The model, prepared or not.
            save_directory: A folder; other files in it are left alone. `load_checkpoint_in_model` reads it.
            max_shard_size: Most bytes in one file, as a number or such as `"200MB"`. If it takes several files, an
                index says what is where.
            safe_serialization: Whether to write safetensors.

        Raises:
            CheckpointError: on every process, if the files cannot be written.
        """
        state = self.get_state_dict(model)
        save_model(state, save_directory, max_shard_size, safe_serialization, leader=self._checkpoints.leads)
