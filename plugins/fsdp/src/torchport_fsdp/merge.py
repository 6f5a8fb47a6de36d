"""Merge the weights of a sharded checkpoint into one file, without the processes that saved it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from torchport.checkpoint.weights import save_weights
from torchport.errors import CheckpointError
from torchport.plugin import shards

SAFE_NAME, NAME = "model.safetensors", "pytorch_model.bin"
_PARTS = re.compile(r"pytorch_model(?:_fsdp)?_(\d+)")


def merge_fsdp_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> list[Path]:
    """Merge the weights that a sharded checkpoint holds into whole files, in this process alone.

    Args:
        checkpoint_dir: A folder that `save_state` wrote, or the folder of one model in it (`pytorch_model_0`).
        output_path: The folder for the result.
        safe_serialization: Whether to write `model.safetensors`, or else `pytorch_model.bin`.
        remove_checkpoint_dir: Whether to delete `checkpoint_dir` when the result is complete.

    Returns:
        The files; further models of the checkpoint are numbered: `model_1.safetensors`.

    Raises:
        CheckpointError: if there is no sharded model, or it cannot be read.
    """
    source, target = Path(checkpoint_dir), Path(output_path)
    folders = _folders(source)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for number, folder in folders:
        state = shards.read_whole(folder)
        paths = shards.paths_of(folder)
        if all(len(paths.get(name, ())) == 2 and paths[name][0] == "model" for name in state):
            state = {str(paths[name][1]): value for name, value in state.items()}  # under a common key
        file = target / (SAFE_NAME if safe_serialization else NAME)
        if number:
            file = file.with_stem(f"{file.stem}_{number}")
        temporary = file.with_name(f".{file.name}.writing")
        if safe_serialization:
            save_weights(state, temporary)
        else:
            torch.save(state, temporary)
        temporary.replace(file)
        written.append(file)
    if remove_checkpoint_dir:
        shutil.rmtree(source)
    return written


def _folders(source: Path) -> list[tuple[int, Path]]:
    """Return the folders of sharded models, by the number of the model."""
    if (source / ".metadata").is_file():
        return [(0, source)]
    inside = source.iterdir() if source.is_dir() else ()
    found = [(int(match[1]), path) for path in inside if (match := _PARTS.fullmatch(path.name))]
    if not found:
        raise CheckpointError(
            f"{source} holds no sharded model",
            found="no such folder" if not source.is_dir() else "no pytorch_model_0 in it",
            hint="the folder that save_state wrote with SHARDED_STATE_DICT, or pytorch_model_0 inside it",
        )
    return sorted(found)
