"""Write and read the weights of a model: safetensors, with shared tensors written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from torchport.errors import CheckpointError

_SHARED = "shared"


def save_weights(state: dict[str, Any], path: Path) -> None:
    """Write a state dict to a safetensors file.

    Args:
        state: Tensors by name. Names of one and the same tensor are written once and listed in the header.
        path: The file.

    Raises:
        CheckpointError: if a value is not a tensor.
    """
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"the model state has values that are not tensors: {', '.join(others[:5])}",
            reason="safetensors files hold tensors only",
            hint="save_state(..., safe_serialization=False)",
        )
    kept: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in owners:
            shared[name] = owners[place]
            continue
        owners[place] = name
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.contiguous() if storage not in storages else tensor.clone().contiguous()
        storages.add(storage)
    save_file(kept, path, metadata={"format": "pt", _SHARED: json.dumps(shared)})


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save_weights` wrote, on the host."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        shared = json.loads((file.metadata() or {}).get(_SHARED, "{}"))
    return state | {name: state[owner] for name, owner in shared.items()}
