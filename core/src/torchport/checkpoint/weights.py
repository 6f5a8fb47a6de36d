"""Write and read the weights of a model: safetensors, with shared tensors written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchport.errors import CheckpointError
from torchport.plugin.strategy import Strategy

_SHARED = "shared"
_COMPILED = "_orig_mod."  # what `torch.compile(module)` puts before the names of the module's parameters


def model_state(strategy: Strategy, model: torch.nn.Module) -> dict[str, Any]:
    """Return the whole state of a prepared model, by the names of the model as it was before it was compiled.

    Args:
        strategy: The strategy that prepared it.
        model: The prepared model. Call this on every process.
    """
    state = strategy.model_state_dict(model)
    if not any(_COMPILED in name for name in state):
        return state
    return {_plain_name(name): value for name, value in state.items()}


def load_model_state(strategy: Strategy, model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load what `model_state` returned, into a model that is compiled or is not; call it on every process."""
    inner = strategy.unwrap(model)
    if any("_orig_mod" in module._modules for module in inner.modules()):
        names = {_plain_name(name): name for name in inner.state_dict(keep_vars=True)}
        state = {names.get(_plain_name(name), name): value for name, value in state.items()}
    strategy.load_model_state_dict(model, state)


def _plain_name(name: str) -> str:
    return name.replace(_COMPILED, "")


def check_tensors(state: dict[str, Any]) -> None:
    """Refuse a state that safetensors cannot hold.

    Raises:
        CheckpointError: if a value is not a tensor.
    """
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"the model state has values that are not tensors: {', '.join(others[:5])}",
            reason="safetensors files hold tensors only",
            hint="safe_serialization=False",
        )


def storage_address(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; 0 where it has none, or its runtime does not tell."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def save_weights(state: dict[str, Any], path: Path) -> None:
    """Write a state dict to a safetensors file.

    Args:
        state: Tensors by name. Names of one and the same tensor are written once and listed in the header, unless
            the device's runtime hides where their memory is.
        path: The file.

    Raises:
        CheckpointError: if a value is not a tensor.
    """
    check_tensors(state)
    kept: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        storage = storage_address(tensor)
        if storage == 0:
            kept[name] = tensor.cpu().contiguous()
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in owners:
            shared[name] = owners[place]
            continue
        owners[place] = name
        kept[name] = tensor.contiguous() if storage not in storages else tensor.clone().contiguous()
        storages.add(storage)
    save_file(kept, path, metadata={"format": "pt", _SHARED: json.dumps(shared)})


def save_object(obj: Any, path: Path, save: Callable[[Any, Path], Any]) -> None:
    """Write one file.

    Args:
        obj: What goes into it.
        path: The file.
        save: Writes an object to a path.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path} cannot be written",
            found=f"there is no folder {path.parent}",
            hint=f"Path({str(path.parent)!r}).mkdir(parents=True) on the main process, before saving",
        )
    try:
        save(obj, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be written", reason=reason) from error


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save_weights` wrote, on the host."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        shared = json.loads((file.metadata() or {}).get(_SHARED, "{}"))
    return state | {name: state[owner] for name, owner in shared.items()}


def weight_names(path: Path) -> list[str]:
    """Return the names in a file that `save_weights` wrote, those of shared tensors included."""
    with safe_open(path, framework="pt") as file:
        return [*file.keys(), *json.loads((file.metadata() or {}).get(_SHARED, "{}"))]
