"""States of which each process holds a part, in the format of `torch.distributed.checkpoint` (DCP).

A folder of it has one file of tensors for each process, PyTorch's table `.metadata` of which part is where, and
`plain.bin` with what is not a tensor. The table is read by a pickle reader that knows the table's own classes
only, and everything else as weights only: no code of a checkpoint is ever run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from torchport.errors import CheckpointError

FORMAT = "dcp"
"""The name of this format in a checkpoint's manifest."""

PLAIN = "plain.bin"
_METADATA = ".metadata"


def model_folder(folder: Path, index: int) -> Path:
    """Return where the parts of a model's state are inside a checkpoint."""
    return folder / f"pytorch_model_{index}"


def optimizer_folder(folder: Path, index: int) -> Path:
    """Return where the parts of an optimizer's state are inside a checkpoint."""
    return folder / f"optimizer_{index}"


def write_shards(tensors: Mapping[str, torch.Tensor], folder: Path, plain: Any = None) -> None:
    """Write the parts of some tensors that this process holds; call it on every process of the job.

    Args:
        tensors: By name; a `DTensor` is written by the processes that hold its parts, any other tensor once.
        folder: Where to; it is made.
        plain: Tensors and plain values that are the same on all processes.
    """
    folder.mkdir(exist_ok=True, parents=True)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False)
    metadata = save(dict(tensors), storage_writer=writer)
    if plain is not None and metadata is not None and _coordinates():
        torch.save(plain, folder / PLAIN)


def read_shards(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Read into tensors, however they are spread over processes and were when they were saved.

    Each process reads what it holds, and waits for no other.

    Raises:
        CheckpointError: if a tensor is not there or has another shape.
    """
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    shapes = _shapes(metadata)
    for name, tensor in tensors.items():
        if shapes.get(name, (None,))[0] != tensor.shape:
            raise CheckpointError(
                f"{folder} does not fit: {name} has the shape {tuple(tensor.shape)}",
                found=f"{tuple(shapes[name][0])} was saved" if name in shapes else "no tensor of that name",
            )
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()


def shapes_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of each tensor of a folder, by name."""
    return _shapes(_Reader(folder).read_metadata())


def paths_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return where each tensor of a folder was in the nested state that was saved, by its name."""
    return {name: tuple(path) for name, path in (_Reader(folder).read_metadata().planner_data or {}).items()}


def read_whole(folder: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read whole tensors in this process alone, on the host; without `names`, all of the folder."""
    shapes = shapes_of(folder)
    tensors = {
        name: torch.empty(shapes[name][0], dtype=shapes[name][1])
        for name in (shapes if names is None else names)
    }
    read_shards(tensors, folder)
    return tensors


def read_plain(folder: Path) -> Any:
    """Read what is not spread over processes; `None` where there is nothing.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = folder / PLAIN
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read", reason=str(error).splitlines()[0]) from error


def split_optimizer_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split what `Optimizer.state_dict` returns into tensors by name and the rest.

    Names are `state.NUMBER.SLOT`, with the number of the parameter among all of the optimizer.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for number, slots in state["state"].items():
        rest[number] = {}
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"state.{number}.{slot}"] = value
            else:
                rest[number][slot] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Put together again what `split_optimizer_state` has split."""
    state = {number: dict(slots) for number, slots in rest["state"].items()}
    for name, tensor in tensors.items():
        _, number, slot = name.split(".", 2)
        state.setdefault(int(number), {})[slot] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


class _Reader(FileSystemReader):
    """Reads the table of a folder without running code that someone may have put there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path, _METADATA)
        try:
            with path.open("rb") as file:
                metadata = _TableUnpickler(file).load()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} holds no sharded state", found=f"no {_METADATA}") from error
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read",
                reason=f"{type(error).__name__}: {error}",
                hint="an older checkpoint",
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} cannot be read", found=f"a {type(metadata).__name__}")
        return metadata


class _TableUnpickler(pickle.Unpickler):
    """Unpickles the classes that DCP's table is made of, and refuses every other name."""

    _TABLE = "torch.distributed.checkpoint.metadata"
    _NAMES = frozenset({
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        listed = (module, name) in self._NAMES
        value = super().find_class(module, name) if listed or module in ("torch", self._TABLE) else None
        own = isinstance(value, type) and value.__module__ == self._TABLE
        if not (listed or own or isinstance(value, torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in this table")
        return value


def _shapes(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (stored.size, stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _coordinates() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
