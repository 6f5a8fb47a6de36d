"""Save under every strategy, be killed, and go on in another job; carry whole weights from any strategy to any other.

checkpoints.py save FOLDER    train, save and train on under each strategy; be killed while saving once more
checkpoints.py load FOLDER    load each and train on; begin under each with the whole weights of each
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from cells import WINDOWS, Cell
from torchport import load_checkpoint_in_model
from torchport.errors import TorchportError
from torchport.state import AcceleratorState
from worker import LIMIT, Network, loss_of, start, train

CELLS = [
    *(Cell(layout, "no", 1, 2) for layout in ("ddp", "fsdp1", "fsdp2 full", "fsdp2 grad-op", "fsdp2 hybrid")),
    *(Cell(f"deepspeed {stage}", "no", 1, 2) for stage in range(4)),
    Cell("fsdp2 full", "fp16", 3, 2),  # with a loss scale
    Cell("ddp", "fp8", 1, 2),
    Cell("deepspeed 2", "bf16", 3, 2),  # with weights in float32 beside those in bfloat16
]
WHOLE = [Cell(layout, "no", 1, 2) for layout in ("ddp", "fsdp2 full", "deepspeed 2", "deepspeed 3")]
BEFORE, AFTER = range(WINDOWS // 2), range(WINDOWS // 2, WINDOWS)


def save(folder: Path) -> dict:
    results = {}
    for cell in CELLS:
        run = start(cell)
        before = train(*run, cell, BEFORE)
        run[0].save_state(folder / cell.name)
        if cell in WHOLE:
            run[0].save_model(run[1], folder / f"whole {cell.name}")
        results[cell.name] = {"before": before[-1], "after": train(*run, cell, AFTER)}
    return results


def die(folder: Path) -> None:
    """Be killed when the engine has written its files, and before the checkpoint is complete."""
    cell = Cell("deepspeed 2", "no", 1, 2)
    accelerator, model, optimizer = start(cell)
    train(accelerator, model, optimizer, cell, BEFORE)
    write = model.save_checkpoint

    def write_and_die(*args, **kwargs):
        write(*args, **kwargs)
        if accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    object.__setattr__(model, "save_checkpoint", write_and_die)
    accelerator.save_state(folder / cell.name)


def load(folder: Path) -> dict:
    results: dict = {"goes on": {}, "whole": {}, "begins": {}, "refused": {}}
    for cell in CELLS:
        run = start(cell, other())
        run[0].load_state(folder / cell.name)
        results["goes on"][cell.name] = train(*run, cell, AFTER)
    for source in WHOLE:
        plain = other()
        load_checkpoint_in_model(plain, folder / f"whole {source.name}", strict=True)
        results["whole"][source.name] = loss_of(plain, -1).item()
        for target in WHOLE:
            begun = other()
            load_checkpoint_in_model(begun, folder / f"whole {source.name}", strict=True)
            results["begins"][f"{source.layout} -> {target.layout}"] = train(
                *start(target, begun), target, AFTER
            )
    for source, target in (
        ("ddp", "deepspeed 2"),
        ("fsdp2 full", "deepspeed 3"),
        ("deepspeed 2", "fsdp2 full"),
    ):
        run = start(Cell(target, "no", 1, 2))
        try:
            run[0].load_state(folder / Cell(source, "no", 1, 2).name)
            results["refused"][f"{source} -> {target}"] = ""
        except TorchportError as error:
            results["refused"][f"{source} -> {target}"] = str(error)
    return results


def other() -> torch.nn.Module:
    """Return a network with other weights."""
    model = Network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    faulthandler.dump_traceback_later(4 * LIMIT, exit=True)
    results = save(folder) if what == "save" else load(folder)
    (folder / f"{what}{os.environ['RANK']}.json").write_text(json.dumps(results))
    if what == "save":
        die(folder)
    AcceleratorState._reset_state()


if __name__ == "__main__":
    main()
