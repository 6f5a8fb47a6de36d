"""Saving in the background in two processes; background.py FOLDER VICTIM, the rank that ends amid the last save."""

import json
import os
import sys
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from torchport import Accelerator
from torchport.checkpoint import atomic, background, project, state
from torchport.checkpoint.weights import load_weights
from torchport.errors import CheckpointError


def begin_after_the_end_of(pid: int) -> None:
    """Let the thread of the next save begin when another process has ended."""
    exchange, other = project.StoreExchange, psutil.Process(pid)

    def late(*arguments):
        other.wait(60)
        return exchange(*arguments)

    project.StoreExchange = late


def main() -> dict:
    folder, victim = Path(sys.argv[1]), int(sys.argv[2])
    background.LOST = 3.0
    accelerator = Accelerator()
    rank = accelerator.process_index
    model = torch.nn.Linear(300, 300)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(1, 300)).sum())
    optimizer.step()

    for number in range(4):
        with torch.no_grad():
            model.module.weight.fill_(number)
        accelerator.save_state(folder / f"{number}", blocking=False)
        with torch.no_grad():
            model.module.weight.fill_(-1.0)
    accelerator.wait_for_checkpoint()
    for number in range(4):
        files = atomic.verify(folder / f"{number}")["files"]
        assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= set(files)
        weights = load_weights(folder / f"{number}" / "model.safetensors")
        assert weights["weight"].unique().tolist() == [number]

    pids = accelerator.gather(torch.tensor([os.getpid()])).tolist()
    save = accelerator.backend.save

    def broken(value, path):
        raise OSError(5, "Input/output error", path.name)

    if rank == 1:
        accelerator.backend.save = broken
    accelerator.save_state(folder / "0", blocking=False)
    accelerator.backend.save = save if rank == 0 else broken
    with pytest.raises(CheckpointError) as failed:
        accelerator.wait_for_checkpoint()
    accelerator.backend.save = save
    atomic.verify(folder / "0")
    if rank == 0:
        store = accelerator._runtime.store
        left = [key for key in store.list_keys() if "torchport/checkpoint" in str(key)]
    else:
        left = []

    if victim == 0 and rank == 1:
        begin_after_the_end_of(pids[0])
    if rank == victim:
        state.FolderWriter.__enter__ = lambda self: os._exit(0)
    accelerator.save_state(folder / "0", blocking=False)
    with pytest.raises(CheckpointError) as lost:
        accelerator.wait_for_checkpoint()
    atomic.verify(folder / "0")
    hidden = sorted(path.name.split("-")[0] for path in folder.glob(".*") if path.is_dir())
    return {
        "failed": str(failed.value),
        "left": [str(key) for key in left],
        "lost": str(lost.value),
        "hidden": hidden,
    }


if __name__ == "__main__":
    try:
        told = main()
    except BaseException:
        told = {"error": traceback.format_exc()}
    rank = os.environ["RANK"]
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # the process group lacks a member
