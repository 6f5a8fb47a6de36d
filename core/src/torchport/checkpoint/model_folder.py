"""The weights of a model for other programs: one file, or several with an index that says what is where."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torchport.checkpoint.agreement import Agreement
from torchport.checkpoint.atomic import flush, leads_outside
from torchport.checkpoint.plain import plain, reason_of
from torchport.checkpoint.weights import (
    check_tensors,
    load_weights,
    save_object,
    save_weights,
    storage_address,
    weight_names,
)
from torchport.errors import CheckpointError, ConfigurationError, UnsupportedOperationError
from torchport.runtime import current_topology

WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
SAFE_WEIGHTS_INDEX_NAME = f"{SAFE_WEIGHTS_NAME}.index.json"

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SHARD = re.compile(r"(?:pytorch_model|model)-\d{5}-of-\d{5}\.(?:bin|safetensors)")


def save_model(
    state: Mapping[str, Any],
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    *,
    leader: bool = True,
) -> None:
    """Write the state of a model into a folder; call it on every process.

    Each file appears when it is whole, the index last; files of an earlier save go after that.

    Args:
        state: The state, by the names of the model. Names of one tensor are written once, in safetensors.
        save_directory: The folder; other files in it are left alone.
        max_shard_size: Most bytes in one file, unless a single tensor has more: a number, or such as `"200MB"`
            (millions) or `"1GiB"`.
        safe_serialization: Whether to write safetensors, or else files of `torch.save`.
        leader: Whether this process writes.

    Raises:
        CheckpointError: on every process, if the files cannot be written, or safetensors cannot hold the state.
        ConfigurationError: if `max_shard_size` cannot be read.
    """
    folder, limit = Path(save_directory), size_in_bytes(max_shard_size)
    whole: dict[str, Any] = dict(state)

    def check() -> None:
        nonlocal whole
        if safe_serialization:
            check_tensors(whole)
        else:
            whole = plain(whole, "the model")

    def write() -> None:
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file", hint="a folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write(whole, folder, limit, safe_serialization)

    agreement = Agreement(f"the model could not be saved in {folder}")
    agreement.step(lambda: check() if leader else None)
    agreement.step(lambda: write() if leader else None, "write")


def _write(state: Mapping[str, Any], folder: Path, limit: int, safe: bool) -> None:
    shards = list(_shards(state, limit))
    whole = SAFE_WEIGHTS_NAME if safe else WEIGHTS_NAME
    stem, suffix = Path(whole).stem, Path(whole).suffix
    names = [whole]
    if len(shards) > 1:
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    token = secrets.token_hex(4)
    hidden = [folder / f".{name}.writing-{token}" for name in names]
    try:
        for shard, path in zip(shards, hidden, strict=True):
            save_weights(shard, path) if safe else torch.save(shard, path)
            flush(path)
        for path, name in zip(hidden, names, strict=True):
            path.replace(folder / name)
    finally:
        for path in hidden:
            path.unlink(missing_ok=True)
    index = folder / f"{whole}.index.json"
    if len(shards) > 1:
        places = {key: name for shard, name in zip(shards, names, strict=True) for key in shard}
        facts = {"total_size": sum(_bytes(value) for value in state.values())}
        path = folder / f".{index.name}.writing-{token}"
        path.write_text(json.dumps({"metadata": facts, "weight_map": places}, indent=1) + "\n")
        flush(path)
        path.replace(index)
    else:
        index.unlink(missing_ok=True)
    for path in folder.iterdir():
        stale = _SHARD.fullmatch(path.name) or path.name == whole
        if stale and path.suffix == suffix and path.name not in names:
            path.unlink()
    flush(folder)


def _shards(state: Mapping[str, Any], limit: int) -> Iterator[dict[str, Any]]:
    """Divide a state into parts of at most `limit` bytes, in its order; names of one tensor stay together."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, value in state.items():
        shared = isinstance(value, torch.Tensor) and value.numel() > 0
        place = (value.device, storage_address(value)) if shared else ()
        groups.setdefault(place if place and place[1] else name, {})[name] = value
    shard: dict[str, Any] = {}
    size = 0
    for group in groups.values():
        added = _distinct_bytes(group)
        if shard and size + added > limit:
            yield shard
            shard, size = {}, 0
        shard |= group
        size += added
    yield shard


def _distinct_bytes(group: Mapping[str, Any]) -> int:
    views = {
        (value.data_ptr(), tuple(value.shape), value.stride())
        if isinstance(value, torch.Tensor)
        else name: value
        for name, value in group.items()
    }
    return sum(_bytes(value) for value in views.values())


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def size_in_bytes(size: int | str) -> int:
    """Return a number of bytes written as a number or with a unit: `"10GB"` (powers of ten), `"1GiB"` (of two).

    Raises:
        ConfigurationError: if it is neither, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ConfigurationError(f"{size!r} is no size", hint="a number of bytes, '200MB', '10GB' or '1GiB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def weight_files(checkpoint: str | os.PathLike[str]) -> list[Path]:
    """Return the files that hold the weights of a model.

    Args:
        checkpoint: A file of weights, an index, or a folder with one of them.

    Raises:
        CheckpointError: if there are none, or an index names a file outside its folder or one that is missing.
    """
    place = Path(checkpoint)
    if place.is_dir():
        known = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        found = [place / name for name in known if (place / name).is_file()] or sorted(
            place.glob("*index.json")
        )
        if not found:
            raise CheckpointError(
                f"there are no weights in {place}", hint=f"a folder with one of {', '.join(known)}"
            )
        place = found[0]
    if not place.is_file():
        raise CheckpointError(f"there is no file {place}")
    if place.suffix != ".json":
        return [place]
    try:
        index = json.loads(place.read_text())
        names = sorted({str(name) for name in index.get("weight_map", index).values()})
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"the index {place} cannot be read", reason=str(error)) from error
    for name in names:
        if reason := leads_outside(place.parent, name, _blobs(place.parent)):
            raise CheckpointError(
                f"the index {place} refers to {name!r}, outside its folder",
                reason=f"{reason}; nothing has been loaded",
            )
        if not (place.parent / name).is_file():
            raise CheckpointError(f"{place.parent} is not complete", found=f"{name} is missing")
    return [place.parent / name for name in names]


def _blobs(folder: Path) -> Path | None:
    """Return where the files of a model hub's local cache lie, to which its folders have links."""
    return folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read the weights of one file, safetensors or of `torch.save`, never running code.

    Args:
        checkpoint_file: The file.
        device_map: `None` for the host, or `{"": device}`.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path, device = Path(checkpoint_file), _only_device(device_map)
    try:
        if path.suffix == ".safetensors":
            return {name: value.to(device) for name, value in load_weights(path).items()}
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read", reason=reason_of(error)) from error
    return state


def load_checkpoint_in_model(
    model: torch.nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    strict: bool = False,
) -> None:
    """Load weights into a model, one file at a time.

    Args:
        model: The model, not prepared.
        checkpoint: A file of weights, an index, or a folder with one of them, as `Accelerator.save_model` writes.
        device_map: `{"": device}` moves the model there; `None` leaves it where it is.
        dtype: What floating-point weights are converted to, and the model with them.
        strict: Whether names must be the same on both sides.

    Raises:
        CheckpointError: if a file is missing, damaged or outside the folder, if shapes differ or, with `strict`,
            if names do. The model is unchanged if names or places are at fault.
    """
    device = _only_device(device_map) if device_map is not None else None
    wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    files = weight_files(checkpoint)
    if strict:
        _check_names(model, {name for file in files for name in _names(file)}, checkpoint)
    if wanted is not None:
        model.to(wanted)
    if device is not None:
        model.to(device)
    for file in files:
        try:
            model.load_state_dict(load_state_dict(file), strict=False)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights in {file} do not fit the model", reason="; ".join(str(error).split("\n\t")[1:])
            ) from error


def _names(file: Path) -> Iterable[str]:
    if file.suffix != ".safetensors":
        return load_state_dict(file)
    try:
        return weight_names(file)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read", reason=reason_of(error)) from error


def _check_names(model: torch.nn.Module, names: set[str], checkpoint: str | os.PathLike[str]) -> None:
    own = model.state_dict(keep_vars=True)
    tied = {id(own[name]) for name in names & own.keys()}
    missing = sorted(name for name in own.keys() - names if id(own[name]) not in tied)
    strange = sorted(names - own.keys())
    if missing or strange:
        found = [f"without {', '.join(missing[:5])}"] if missing else []
        found += [f"with {', '.join(strange[:5])}, which the model has not"] if strange else []
        raise CheckpointError(
            f"the weights in {checkpoint} are not those of the model",
            found="; ".join(found),
            reason="nothing has been loaded",
        )


def _only_device(device_map: Mapping[str, Any] | None) -> Any:
    if device_map is None:
        return "cpu"
    if set(device_map) != {""}:
        raise UnsupportedOperationError(
            "device maps with several entries are not available in this version", hint="{'': device}"
        )
    return device_map[""]


def load(f: str | os.PathLike[str], map_location: Any = None, **kwargs: Any) -> Any:
    """Read what `torch.save` or `Accelerator.save` wrote: tensors and plain values, never running code.

    Args:
        f: The file, also of safetensors.
        map_location: Where tensors go, as for `torch.load`; by default the host.
        **kwargs: As for `torch.load`; `weights_only` is always true.

    Raises:
        CheckpointError: if it cannot be read, or has code in it.
    """
    path = Path(f)
    try:
        if path.suffix == ".safetensors":
            return load_weights(path)
        return torch.load(path, map_location=map_location or "cpu", **{**kwargs, "weights_only": True})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read", reason=reason_of(error)) from error


def save(
    obj: Any, f: str | os.PathLike[str], save_on_each_node: bool = False, safe_serialization: bool = False
) -> None:
    """Write an object on the main process, with `torch.save` or (tensors by name) as safetensors.

    Args:
        obj: The object.
        f: The file.
        save_on_each_node: Whether the main process of every machine writes.
        safe_serialization: Whether to write safetensors.

    Raises:
        CheckpointError: on a process that writes, if the file cannot be written.
    """
    topology = current_topology()
    if (topology.local_rank if save_on_each_node else topology.rank) == 0:
        save_object(obj, Path(f), save_weights if safe_serialization else torch.save)
