"""DeepSpeed's universal format, which any number of processes can load, for optimizers of up to two states."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torchport.errors import CheckpointError

from torchport_deepspeed import vendor

_ADAM = ("exp_avg", "exp_avg_sq")
"""The states of Adam: DeepSpeed converts states of these names, and looks for both."""

_PARTITIONS = "single_partition_of_fp32_groups"
"""Where the files of stages 1 and 2 hold the float32 copies of the parameters, flat, one for each group."""


def convert(source: Path, target: Path) -> None:
    """Convert an engine's files, which hold no other code than DeepSpeed's own.

    Args:
        source: The folder of an engine inside a checkpoint.
        target: The folder to write; its parent must exist.

    Raises:
        CheckpointError: if the optimizer has states that DeepSpeed cannot convert.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="torchport-renamed-") as made, vendor.quietly():
        folder, names = _as_adam(source, Path(made) / source.name)
        main(
            SimpleNamespace(
                input_folder=str(folder),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    for borrowed in (name for name in _ADAM if names.get(name) != name):
        for path in list((target / "zero").rglob(f"{borrowed}.pt")):
            if borrowed in names:
                path.rename(path.with_name(f"{names[borrowed]}.pt"))
            else:
                path.unlink()


def _as_adam(source: Path, target: Path) -> tuple[Path, dict[str, str]]:
    """Give the states of another optimizer the names of Adam's, in a copy, and zeros for what it has not.

    Returns:
        The folder to convert, and the own name of the state that goes by each of Adam's names.
    """
    saved = {path: _load(path) for path in sorted(source.glob("*_optim_states.pt"))}
    own = {
        name for optimizer in saved.values() for state in _states(optimizer).values() for name in _flat(state)
    }
    if own == set(_ADAM):
        return source, {name: name for name in _ADAM}
    if len(own) > len(_ADAM) or not all(
        _PARTITIONS in optimizer["optimizer_state_dict"] for optimizer in saved.values()
    ):
        raise CheckpointError(
            f"{source} holds states of an optimizer that DeepSpeed cannot convert",
            found=", ".join(sorted(own)) or "none",
            reason="under ZeRO stage 3 it converts those of Adam, under stages 1 and 2 any two",
            hint="go on with as many processes as it was saved by",
        )
    names = dict(zip(_ADAM, sorted(own), strict=False))
    target.mkdir()
    for path in source.iterdir():
        if path not in saved:
            (target / path.name).symlink_to(path.resolve())
    for path, optimizer in saved.items():
        states = _states(optimizer)
        for group, partition in enumerate(optimizer["optimizer_state_dict"][_PARTITIONS]):
            state = states.setdefault(group, {})
            for borrowed in _ADAM:
                mine = state.pop(names.get(borrowed, ""), None)
                state[borrowed] = torch.zeros_like(partition) if mine is None else mine
        torch.save(optimizer, target / path.name)
    return target, names


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # looked through before


def _states(optimizer: Any) -> dict[int, dict[str, Any]]:
    """Return the optimizer's own states in one of the engine's files, by group of parameters."""
    held = optimizer["optimizer_state_dict"]
    inner = held.get("base_optimizer_state") or held.get("optimizer_state_dict") or {}
    states: dict[int, dict[str, Any]] = inner.get("state", {})
    return states


def _flat(state: dict[str, Any]) -> list[str]:
    """Name the states that hold a number for each element of the parameters, not one for all."""
    return [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.ndim]
