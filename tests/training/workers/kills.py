"""Kill training processes at random moments around and during save_state, and look at what they leave.

kills.py FOLDER NUMBER [SEED] prints one line with the figures, and writes them to FOLDER/rank0.json.

Each round forks one or two processes, which go on from the newest complete checkpoint, check that it is one state and
no mixture of two, and save one state after another until they are killed. This process only looks at folders.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from torchport import Accelerator, Progress, ProjectConfiguration
from torchport.checkpoint import atomic
from torchport.checkpoint.project import numbered
from torchport.state import AcceleratorState

DEADLINE = 60.0
LONGEST = 0.12  # seconds from the first save to the kill: some saves


def warm_up(folder: Path) -> None:
    """Import what training imports when it is first used, once for all rounds."""
    accelerator = Accelerator()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    accelerator.prepare(model, optimizer)
    accelerator.save_state(folder / "warm")
    accelerator.load_state(folder / "warm")
    AcceleratorState._reset_state()


def train(folder: Path, blocking: bool, naming: bool, told: int) -> None:
    """Go on from the newest checkpoint and save for ever; tell the parent what is resumed and what is saved."""
    torch.set_num_threads(1)
    project = ProjectConfiguration(
        project_dir=str(folder), automatic_checkpoint_naming=naming, total_limit=3 if naming else None
    )
    state = folder / "state"
    resume = "auto" if naming else str(state) if state.exists() else ""
    accelerator = Accelerator(project_config=project, resume=resume)
    layers = torch.nn.Sequential(*[torch.nn.Linear(96, 96) for _ in range(6)])
    optimizer = torch.optim.AdamW(layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    progress = Progress(version=0)
    accelerator.prepare(layers, optimizer)
    accelerator.register_for_checkpointing(progress)
    tensors = [*layers.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]
    accelerator.resume()
    if accelerator.resumed_from:
        tensors = [*layers.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]
        values = {value for tensor in tensors for value in tensor.unique().tolist()}
        assert values == {float(progress.version)}, f"{accelerator.resumed_from} mixes states: {values}"
    if accelerator.is_main_process:
        os.write(told, f"resumed {progress.version}\n".encode())
    while True:
        progress.version += 1
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(progress.version)
        accelerator.save_state(None if naming else state, blocking=blocking)
        version = progress.version if blocking else progress.version - 1  # the save before has ended
        if accelerator.is_main_process:
            os.write(told, f"saved {version}\n".encode())
        with torch.no_grad():
            for tensor in tensors:  # what a save in the background must not see
                tensor.fill_(-1.0)


def start(environ: dict[str, str], *arguments) -> int:
    """Fork a training process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(environ)
        train(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def places(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def lines(pipe: int, deadline: float) -> list[str]:
    """Read what there is, waiting for the first line."""
    text = b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "a training process said nothing for a minute"
        piece = os.read(pipe, 65536)
        assert piece, "a training process ended by itself"
        text += piece
    return text.decode().splitlines()


def rest(pipe: int) -> list[str]:
    """Read what was said before the end; the last line may be cut off."""
    text = b""
    while piece := os.read(pipe, 65536):
        text += piece
    return text.decode().split("\n")[:-1]


def look(folder: Path, naming: bool) -> int:
    """Verify everything that has a final name, and return how many folders were being written."""
    home = folder / "checkpoints" if naming else folder
    if not home.exists():
        return 0
    for path in home.iterdir():
        if not path.name.startswith("."):
            atomic.verify(path)
    if naming:
        assert len(numbered(home)) == sum(not path.name.startswith(".") for path in home.iterdir())
    return sum(".writing-" in path.name for path in home.iterdir() if path.is_dir())


def kill_one(folder: Path, number: int, chance: random.Random, safe: dict[Path, int]) -> int:
    """One round; returns whether a checkpoint was being written when the kill came."""
    blocking, naming, processes = number % 2 == 0, number % 3 != 0, 2 if number % 5 == 4 else 1
    home = folder / ("numbered" if naming else "replaced")
    home.mkdir(exist_ok=True)
    pipe, told = os.pipe()
    pids = [start(place, home, blocking, naming, told) for place in places(processes)]
    os.close(told)
    try:
        first = lines(pipe, time.monotonic() + DEADLINE)
        resumed = int(first[0].split()[1])
        assert resumed >= safe.get(home, 0), f"{safe[home]} was on the disk, and {resumed} was resumed"
        time.sleep(chance.uniform(0, LONGEST))
    finally:
        chance.shuffle(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(chance.choice((0, 0.01)))
        for pid in pids:
            os.waitpid(pid, 0)
    said = [line for line in (*first, *rest(pipe)) if line.startswith("saved")]
    os.close(pipe)
    safe[home] = max([resumed, *(int(line.split()[1]) for line in said)])
    return look(home, naming)


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else time.time_ns())
    torch.set_num_threads(1)
    warm_up(folder)
    safe: dict[Path, int] = {}
    amid = sum(kill_one(folder, index, chance, safe) > 0 for index in range(number))
    for home in sorted(safe):  # a save that ends takes away what the killed ones have left
        AcceleratorState._reset_state()
        Accelerator().save_state((home / "checkpoints" if home.name == "numbered" else home) / "last")
        left = [path.name for path in home.rglob(".*")]
        assert left == [], left
    figures = {"kills": number, "amid": amid, "complete": number, "half-written": 0}
    print(f"{number} kills, {amid} of them while a checkpoint was being written: ", end="")
    print(f"the newest checkpoint was complete after {number}, half-written under its name after 0")
    (folder / "rank0.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
