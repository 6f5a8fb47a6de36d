"""Save under every strategy, be killed, and go on in another job; carry whole weights from any strategy to any other.

checkpoints.py save FOLDER              train, save and train on under each strategy
checkpoints.py die FOLDER CELL RANK     train anew under one, and save in the same place: a rank is killed amid a file
checkpoints.py load FOLDER              load each and train on; begin under each with the whole weights of each
checkpoints.py go-on FOLDER CELL...     load some and train on
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterable
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
AMID = 4096  # bytes: less than any process writes of random numbers, weights or parts of them
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


def die(folder: Path, name: str, rank: int) -> None:
    """Replace a checkpoint, and be killed by the kernel when a file that this rank writes has `AMID` bytes."""
    cell = next(cell for cell in CELLS if cell.name == name)
    run = start(cell, other())
    train(*run, cell, BEFORE)
    if run[0].process_index == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (AMID, AMID))
    run[0].save_state(folder / name)


def go_on(folder: Path, cells: Iterable[Cell]) -> dict:
    results = {}
    for cell in cells:
        run = start(cell, other())
        run[0].load_state(folder / cell.name)
        results[cell.name] = train(*run, cell, AFTER)
    return results


def load(folder: Path) -> dict:
    results: dict = {"goes on": go_on(folder, CELLS), "whole": {}, "begins": {}, "refused": {}}
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
    what, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    faulthandler.dump_traceback_later(4 * LIMIT, exit=True)
    if what == "die":
        die(folder, names[0], int(names[1]))
        return
    if what == "go-on":
        results = {"goes on": go_on(folder, [cell for cell in CELLS if cell.name in names])}
    else:
        results = save(folder) if what == "save" else load(folder)
    (folder / f"{what}{os.environ['RANK']}.json").write_text(json.dumps(results))
    AcceleratorState._reset_state()


if __name__ == "__main__":
    main()
