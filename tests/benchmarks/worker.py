"""What runs inside the measured processes: `worker.py step|engine|fsdp|fp8|gather|loader|save OUT [options]`.

`run.py` starts it, with torchrun where two processes are wanted, and reads the durations that rank 0 writes to OUT.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import BATCH, CONTESTANTS, ENGINES, STEPS, Contestant, check, parts
from sampling import alternate, in_turn
from torch.utils.data import DataLoader

Taken = dict[str, dict[str, list[float]]]
"""Seconds by what was measured and by contestant."""


def open_group() -> None:
    """Open the process group that all contestants share, where there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")


def together() -> None:
    """Start a measurement at the same time in all processes."""
    if dist.is_initialized():
        dist.barrier()


CHUNK = 10  # steps: short, so that what loads the machine for a moment loads all contestants of a round
WARM_UP = (
    2  # steps before them that are not measured: the contestant before has left its own code in the caches
)
GENERATION = 20  # rounds


def step(rounds: int, contestants: Mapping[str, Callable[[], Contestant]] = CONTESTANTS) -> Taken:
    """Time some steps of each contestant in turn, by the clock on the wall and by that of the processor.

    Two equal loops differ by some per cent for as long as they live, by where their tensors happen to lie in
    memory. All contestants are therefore made anew, in another order, every few rounds.
    """
    open_group()
    names = list(contestants)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for generation in range(-(-rounds // GENERATION)):
        first = generation % len(names)
        gc.unfreeze()
        made = {name: contestants[name]() for name in names[first:] + names[:first]}
        running = {name: contestant.run() for name, contestant in made.items()}
        for steps in running.values():
            deque(islice(steps, STEPS), maxlen=0)
        check(made)
        gc.collect()
        gc.freeze()  # what is there already is not looked through again in anyone's steps
        for name in in_turn(list(made), GENERATION):
            steps = running[name]
            gc.collect()
            deque(islice(steps, WARM_UP), maxlen=0)
            together()
            used, started = time.process_time(), time.perf_counter()
            for _ in range(CHUNK):
                next(steps)
            wall[name].append((time.perf_counter() - started) / CHUNK)
            processor[name].append((time.process_time() - used) / CHUNK)
        for steps in running.values():
            steps.close()  # type: ignore[attr-defined]
    return {"wall": wall, "processor": processor}


SIZES = {"4 B": (1, 300), "4 kB": (1_000, 300), "4 MB": (1_000_000, 10)}


def gather(rounds: int) -> Taken:
    """Time gathering a float32 vector, by size."""
    open_group()
    contestants = {name: make() for name, make in CONTESTANTS.items()}
    taken = {}
    for title, (elements, calls) in SIZES.items():
        tensor = torch.arange(elements, dtype=torch.float32) + dist.get_rank()
        expected = contestants["torch"].gather(tensor)
        for name, contestant in contestants.items():
            assert torch.equal(contestant.gather(tensor), expected), name

        def timed(
            gather: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor = tensor, calls: int = calls
        ) -> Callable[[], float]:
            def measure() -> float:
                together()
                started = time.perf_counter()
                for _ in range(calls):
                    gather(tensor)
                return (time.perf_counter() - started) / calls

            return measure

        taken[title] = alternate({name: timed(c.gather) for name, c in contestants.items()}, rounds)
    return taken


def loader(rounds: int) -> dict[str, Taken]:
    """Time epochs of one hand-written step, whose batches come from a plain loader and `.to`, or a prepared one."""
    from torchport import Accelerator

    device = torch.device("cpu")
    accelerator = Accelerator()
    taken = {}
    for workers in (0, 2):
        model, optimizer, _, data = parts()
        settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        plain, again = (DataLoader(data, batch_size=BATCH, **settings) for _ in range(2))
        prepared = accelerator.prepare(DataLoader(data, batch_size=BATCH, **settings))

        def epoch(
            batches: Any, place: bool, model: torch.nn.Module = model, optimizer: Any = optimizer
        ) -> float:
            started = time.perf_counter()
            for inputs, labels in batches:
                if place:
                    inputs, labels = inputs.to(device), labels.to(device)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            return (time.perf_counter() - started) / STEPS

        measures: dict[str, Callable[[], float]] = {
            "torch": partial(epoch, plain, True),
            "torch (again)": partial(epoch, again, True),
            "torchport": partial(epoch, prepared, False),
        }
        for measure in measures.values():
            measure()
        taken[str(workers)] = alternate(measures, rounds)
    return taken


def save(rounds: int, megabytes: int, folder: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Time saving a model and its AdamW state, three tensors of each parameter's size in all.

    Args:
        rounds: How often each is measured.
        megabytes: Size of the state.
        folder: Where to save.
        only: Names of contestants; all if empty.
    """
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * (1024 * 1024 + 1024))))
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    size = 3 * sum(parameter.nbytes for parameter in model.parameters())

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def by_hand(target: Path) -> None:
        torch.save(state(), target)

    def by_hand_and_flushed(target: Path) -> None:
        with target.open("wb") as file:
            torch.save(state(), file)
            file.flush()
            os.fsync(file.fileno())

    accelerator = _accelerator(model, optimizer)
    contestants: dict[str, Callable[[Path], Any]] = {
        "torch.save": by_hand,
        FLUSHED: by_hand_and_flushed,
        "torchport": accelerator.save_state,
        BACKGROUND: lambda target: accelerator.save_state(target, blocking=False),
    }
    if only:
        contestants = {name: contestants[name] for name in only}
    else:
        contestants["accelerate"] = _accelerate_save(model, optimizer)
        contestants["fabric"] = _fabric_save(model, optimizer)

    def timed(number: int, name: str) -> Callable[[], float]:
        target = folder / f"{number}"

        def measure() -> float:
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            os.sync()  # nobody pays for what another has left to be written
            started = time.perf_counter()
            contestants[name](target)
            taken = time.perf_counter() - started
            accelerator.wait_for_checkpoint()
            return taken

        return measure

    measures = {name: timed(number, name) for number, name in enumerate(contestants)}
    extra = {name: _extra_memory(measures[name]) for name in ("torchport", BACKGROUND) if name in measures}
    for measure in measures.values():
        measure()
    return {"bytes": size, "extra": extra, "wall": alternate(measures, rounds)}


FLUSHED = "torch.save + fsync"
BACKGROUND = "torchport, blocking=False"


def _extra_memory(call: Callable[[], Any]) -> int:
    """Return by how many bytes the memory of this process grows while something runs for the first time."""
    page, ended, seen = os.sysconf("SC_PAGE_SIZE"), threading.Event(), []

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not ended.wait(0.005):
            seen.append(resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    seen.append(resident())
    ended.set()
    watcher.join()
    return max(seen) - before


def _accelerator(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    from torchport import Accelerator

    accelerator = Accelerator()
    accelerator.prepare(model, optimizer)
    return accelerator


def _accelerate_save(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Path], Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    return lambda target: accelerator.save_state(str(target))


def _fabric_save(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Path], Any]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, prepared = fabric.setup(model, optimizer)
    return lambda target: fabric.save(target, {"model": wrapped, "optimizer": prepared})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("step", "engine", "gather", "loader", "save", "save-background", "fsdp", "fp8")
    parser.add_argument("what", choices=kinds)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("."))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.what == "save":
        taken: Any = save(args.rounds, args.megabytes, args.folder)
    elif args.what == "save-background":
        taken = save(args.rounds, args.megabytes, args.folder, (FLUSHED, BACKGROUND))
    elif args.what == "fsdp":
        from sharded import CONTESTANTS as SHARDED

        taken = step(args.rounds, SHARDED)
    elif args.what == "fp8":
        from float8 import CONTESTANTS as FLOAT8

        taken = step(args.rounds, FLOAT8)
    else:
        taken = {
            "step": step,
            "engine": partial(step, contestants=ENGINES),
            "gather": gather,
            "loader": loader,
        }[args.what](args.rounds)
    if not dist.is_initialized() or dist.get_rank() == 0:
        args.out.write_text(json.dumps(taken))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
