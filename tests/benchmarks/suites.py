"""The benchmarks: each returns one or more results."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sampling import Budget, Result, alternate, in_turn

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"
BIN = Path(sys.executable).parent
DEADLINE = 300  # seconds for any one process
STREAMED = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=1048576"}
"""Makes glibc write past the caches where it copies more than 1 MB."""


def step(quick: bool) -> list[Result]:
    """The smallest useful loop in one process."""
    return _steps(_worker("step", 200 if quick else 600), "step", "Training step, 1 process", 1.03)


def ddp(quick: bool) -> list[Result]:
    """The same over two processes."""
    taken = _worker("step", 200 if quick else 1000, processes=2)
    return _steps(taken, "ddp", "Training step, 2 processes, DDP over gloo", 1.02)


def fsdp(quick: bool) -> list[Result]:
    """A loop over parameters that are spread over two processes."""
    taken = _worker("fsdp", 20 if quick else 100, processes=2)
    notes = [
        "Four residual blocks of 256 and 512 units, each a unit of its own, SGD, gradients clipped, batches of 32 per"
        " process; `torch` is `fully_shard` by hand, with an optimizer made afterwards. accelerate is missing because it"
        " takes DDP instead on CPUs. After the first epoch all contestants had the same parameters.",
    ]
    return [
        Result(
            "fsdp", "Training step, 2 processes, FSDP2 over gloo", taken["wall"], baseline="torch",
            unit="µs a step", scale=1e6, budget=Budget("ratio", 1.05, "torch"), notes=notes,
        )
    ]  # fmt: skip


def deepspeed(quick: bool) -> list[Result]:
    """The same with DeepSpeed's engine, beside DeepSpeed by hand."""
    taken = _worker("engine", 40 if quick else 200, processes=2)
    return _steps(taken, "deepspeed", "Training step, 2 processes, ZeRO-2", 1.03, baseline="deepspeed")


def fp8(quick: bool) -> list[Result]:
    """A loop with products in 8 bits, beside torchao by hand."""
    taken = _worker("fp8", 60 if quick else 200)
    notes = [
        "Two residual blocks of 64 and 128 units in 8 bits, tensor-wise scales, the layers before and after them in"
        " bfloat16, SGD, batches of 32; FP8 is emulated on processors. `torchao` is `convert_to_float8_training` and"
        " `torch.autocast` by hand. After the first epoch all contestants had the same parameters.",
    ]
    unit: dict[str, Any] = {"baseline": "torchao", "unit": "µs a step", "scale": 1e6}
    budget, title = Budget("ratio", 1.03, "torchao"), "Training step, 1 process, FP8 with torchao"
    return [
        Result("fp8", title, taken["wall"], **unit, budget=budget, notes=notes),
        Result("fp8-processor", f"{title}, processor time", taken["processor"], **unit),
    ]


def _steps(taken: Any, name: str, title: str, limit: float, baseline: str = "torch") -> list[Result]:
    notes = [
        "A multi-layer perceptron of 32, 64 and 10 units, SGD, StepLR, batches of 32 per process from a TensorDataset;"
        f" one measurement is 10 steps of an epoch of 50. `{baseline} (again)` is the same loop once more: its distance from 1 is what"
        " the machine's noise leaves open.",
        "After the first epoch all contestants had the same parameters.",
    ]
    unit: dict[str, Any] = {"baseline": baseline, "unit": "µs a step", "scale": 1e6}
    budget = Budget("ratio", limit, baseline)
    return [
        Result(name, title, taken["wall"], **unit, budget=budget, notes=notes),
        Result(
            f"{name}-processor", f"{title}, processor time", taken["processor"], **unit,
            notes=["The processor time of the same steps (rank 0): what waiting for a busy core does not change."],
        ),
    ]  # fmt: skip


def loader(quick: bool) -> list[Result]:
    """What a prepared loader adds to a step, without and with workers."""
    taken = _worker("loader", 20 if quick else 60)
    notes = [
        "Epochs of 50 hand-written steps (the model and batches of the step above) over a plain `DataLoader` with `.to`, and"
        " over a prepared one; workers persist."
    ]
    return [
        Result(
            f"loader-{workers}", f"Training step with a prepared loader, {workers} workers", seconds,
            baseline="torch", unit="µs a step", scale=1e6, budget=Budget("ratio", 1.03, "torch"), notes=notes,
        )
        for workers, seconds in taken.items()
    ]  # fmt: skip


def help_(quick: bool) -> list[Result]:
    """How long the command lines take to say what they can do."""
    commands = {
        name: [str(BIN / name), "--help"] for name in ("torchport", "accelerate", "fabric", "torchrun")
    }
    commands = {"python": [sys.executable, "-c", "pass"], **commands}
    taken = alternate({name: _timed(command) for name, command in commands.items()}, 3 if quick else 7)
    imports = {name: _imports_torch(command) for name, command in commands.items() if name != "python"}
    notes = ["torch is imported by: " + (", ".join(n for n, yes in imports.items() if yes) or "none") + "."]
    if imports["torchport"]:
        raise AssertionError("torchport --help imports torch")
    result = Result(
        "help",
        "`--help` of the command line",
        taken,
        baseline="python",
        budget=Budget("absolute", 0.25),
        notes=notes,
    )
    return [result]


def launch(quick: bool) -> list[Result]:
    """Launch an empty script in one process, and a script that meets at a barrier in two."""
    return [_launch_one(5 if quick else 7), _launch_two(3 if quick else 7)]


def _launch_one(rounds: int) -> Result:
    script = str(SCRIPTS / "empty.py")
    commands = {
        "python": [sys.executable, script],
        "torchport": [str(BIN / "torchport"), "launch", script],
        "accelerate": [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", script],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "1", script],
        "fabric": [str(BIN / "fabric"), "run", "--accelerator", "cpu", "--devices", "1", script],
    }
    return Result(
        "launch-1",
        "Launch of an empty script, 1 process",
        alternate({name: _timed(command) for name, command in commands.items()}, rounds),
        baseline="python",
        budget=Budget("difference", 0.25, "python"),
    )


def _launch_two(rounds: int) -> Result:
    script = str(SCRIPTS / "barrier.py")

    def by_hand() -> float:
        """Two interpreters, without any launcher: the lower bound."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        workers = [
            subprocess.Popen(
                [sys.executable, script],
                env=_environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        printed = [worker.communicate(timeout=DEADLINE)[0] for worker in workers]
        taken = time.perf_counter() - started
        _expect_two("two interpreters", "".join(printed))
        return taken

    commands = {
        "torchport": [str(BIN / "torchport"), "launch", "--num-processes", "2", script],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", script],
        "fabric": [
            str(BIN / "fabric"), "run", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", script,
        ],
    }  # fmt: skip
    measures: dict[str, Callable[[], float]] = {"two interpreters": by_hand}
    for name, command in commands.items():
        measures[name] = _timed(command, check=lambda printed, name=name: _expect_two(name, printed))
    return Result(
        "launch-2",
        "Launch of 2 processes, gloo, to the first barrier and out",
        alternate(measures, rounds),
        baseline="torchrun",
        budget=Budget("ratio", 0.6, "torchrun"),
        notes=[
            "`two interpreters` starts the script twice without any launcher: the lower bound.",
            "accelerate is missing because `accelerate launch --cpu --num_processes 2` starts one process.",
        ],
    )


def _expect_two(name: str, printed: str) -> None:
    found = printed.count("passed")
    if found != 2:
        raise AssertionError(f"{name} was to run 2 processes, and {found} passed the barrier")


def import_(quick: bool) -> list[Result]:
    """How long the packages take to import."""
    modules = ("torchport", "accelerate", "lightning_fabric", "torch")
    commands = {name: [sys.executable, "-c", f"import {name}"] for name in modules}
    commands = {"python": [sys.executable, "-c", "pass"], **commands}
    if _imports_torch(commands["torchport"]):
        raise AssertionError("import torchport imports torch")
    taken = alternate({name: _timed(command) for name, command in commands.items()}, 5 if quick else 7)
    result = Result(
        "import", "Import, with the start of Python", taken, baseline="python",
        budget=Budget("difference", 0.05, "python"), notes=["`import torchport` imports neither torch nor a plugin."],
    )  # fmt: skip
    return [result]


_DISCOVER = """
import sys, time
from torchport.plan.discovery import discover
started = time.perf_counter()
installed = discover({})
print(time.perf_counter() - started, len(installed.plugins), sorted({"torch", "numpy"} & sys.modules.keys()))
"""


def discovery(quick: bool) -> list[Result]:
    """How long it takes to find and register all installed plugins."""
    plugins = set()

    def call() -> float:
        command = [sys.executable, "-c", _DISCOVER]
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=DEADLINE, check=True
        )
        seconds, count, heavy = done.stdout.split(maxsplit=2)
        if heavy.strip() != "[]":
            raise AssertionError(f"discovering plugins imports {heavy}")
        plugins.add(count)
        return float(seconds)

    rounds = 3 if quick else 9
    whole = {"python": [sys.executable, "-c", "pass"], "torchport": [sys.executable, "-c", _DISCOVER]}
    called = alternate({"torchport": call}, rounds)
    taken = alternate({name: _timed(command) for name, command in whole.items()}, rounds)
    notes = [
        f"All installed plugins, {'/'.join(sorted(plugins))} with the core's own, in a fresh process; torch is not imported."
    ]
    return [
        Result(
            "discovery", "Discovery of all installed plugins", called,
            baseline="torchport", budget=Budget("absolute", 0.06), notes=notes,
        ),
        Result(
            "discovery-process", "The same, with the start of Python and the imports of the core", taken,
            baseline="python", notes=notes,
        ),
    ]  # fmt: skip


def gather(quick: bool) -> list[Result]:
    """Gather a tensor over two processes."""
    taken = _worker("gather", 15 if quick else 25, processes=2)
    notes = [
        "`torch` is `all_gather_single` (before PyTorch 2.13 `all_gather_into_tensor`) into a new tensor; the results of all were equal."
    ]
    return [
        Result(
            f"gather-{size.replace(' ', '')}", f"Gather of {size} from each of 2 processes", seconds,
            baseline="torch", unit="µs a call", scale=1e6, notes=notes,
        )
        for size, seconds in taken.items()
    ]  # fmt: skip


def save(quick: bool) -> list[Result]:
    """Save a model and its optimizer's state."""
    folder = Path(tempfile.mkdtemp(prefix="torchport-bench-", dir=os.environ.get("BENCH_DISK")))
    rounds, options = 5 if quick else 7, ("--megabytes", "200" if quick else "800", "--folder", str(folder))
    try:
        taken = _worker("save", rounds, *options)
        streamed = _worker("save-background", rounds, *options, variables=STREAMED)["wall"]
    finally:
        shutil.rmtree(folder)
    megabytes = taken["bytes"] / 1e6
    fsync, plain = taken["wall"]["torch.save + fsync"], taken["wall"]["torch.save"]
    plainly = statistics.median(a / b for a, b in zip(taken["wall"]["torchport"], plain, strict=True))
    background = "torchport, blocking=False"
    blocked = taken["wall"].pop(background)
    ratios = [
        ours / theirs
        for ours, theirs in zip(streamed[background], streamed["torch.save + fsync"], strict=True)
    ]
    extra = {name: grown / 1e6 for name, grown in taken["extra"].items()}
    result = Result(
        "save", f"Save {megabytes:.0f} MB: a model and its AdamW state", taken["wall"],
        baseline="torch.save + fsync", unit="MB/s", amount=megabytes,
        budget=Budget("ratio", 1.0, "torch.save + fsync"),
        notes=[
            "Torchport's checkpoint is on the disk, with a checksum of every file, before `save_state` returns; so the"
            " fair comparison is `torch.save` followed by `fsync`. The others, and `torch.save` alone, return when"
            f" the data is in the system's memory; Torchport takes {plainly:.2f} x the time of the latter.",
            f"{len(fsync)} rounds; dirty pages are written out before each measurement.",
        ],
    )  # fmt: skip
    setting = " ".join(f"{name}={value}" for name, value in STREAMED.items())
    blocking = Result(
        "save-background", f"Time that `save_state(blocking=False)` blocks, {megabytes:.0f} MB",
        {"torch.save + fsync": fsync, "torchport": blocked}, baseline="torch.save + fsync", unit="ms", scale=1e3,
        budget=Budget("ratio", 0.1, "torch.save + fsync"),
        notes=[
            "Until the state has been copied to host memory; the first save, which takes that memory from the system, is"
            f" not among these. Peak extra host memory: {extra[background]:.0f} MB without blocking,"
            f" {extra['torchport']:.0f} MB with blocking.",
            "The tensors are of 4 MB, which the C library copies through the processor's caches. In a process started"
            f" with `{setting}`, so that it writes past them: {statistics.median(ratios):.3f} x.",
        ],
    )  # fmt: skip
    return [result, blocking]


def compile_(quick: bool) -> list[Result]:
    """Compile a transformer whole, and by its regions."""
    blocks, rounds = 6 if quick else 12, 1 if quick else 3
    modes = {"torchport": "regions", "whole model": "whole", "not compiled": "eager"}
    taken: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in modes} for what in ("first", "processor", "step")
    }
    for name in in_turn(list(modes), rounds):
        for what, seconds in _compile_once(modes[name], blocks).items():
            taken[what][name].append(seconds)
    notes = [
        f"A causal transformer of {blocks} equal blocks of width 256, 4 sequences of 64 tokens, forward and backward,"
        " compiled by inductor into an empty cache in a new process. `torchport` is"
        " `TorchDynamoPlugin(use_regional_compilation=True)`."
    ]
    return [
        Result(
            "compile-first", f"First step of a transformer of {blocks} blocks, with compiling", taken["first"],
            baseline="whole model", budget=Budget("ratio", 1.0, "whole model"), notes=notes,
        ),
        Result(
            "compile-processor", "The same, processor time", taken["processor"], baseline="whole model",
            notes=["With that of the C++ compiler: what waiting for a busy core does not change."],
        ),
        Result(
            "compile-step", "A step after it", taken["step"], baseline="whole model", unit="ms a step", scale=1e3
        ),
    ]  # fmt: skip


def _compile_once(mode: str, blocks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="torchport-bench-") as cache:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / "compile.py"), mode, str(blocks)],
            env=_environment(TORCHINDUCTOR_CACHE_DIR=cache, TORCHINDUCTOR_COMPILE_THREADS="1"),
            capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the benchmark of compiling failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


SUITES: dict[str, Callable[[bool], list[Result]]] = {
    "step": step,
    "ddp": ddp,
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "fp8": fp8,
    "loader": loader,
    "help": help_,
    "launch": launch,
    "import": import_,
    "discovery": discovery,
    "gather": gather,
    "save": save,
    "compile": compile_,
}


def _environment(**extra: str) -> dict[str, str]:
    """Return the environment without what would make a launcher believe that it is inside a job."""
    own = (
        "TORCHPORT_",
        "ACCELERATE_",
        "LT_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "GROUP_",
        "TORCHELASTIC_",
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    return clean | {"OMP_NUM_THREADS": "1"} | extra


def _timed(command: Sequence[str], check: Callable[[str], None] | None = None) -> Callable[[], float]:
    """Return a function that runs a command and returns its duration, from start to exit."""

    def measure() -> float:
        started = time.perf_counter()
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        taken = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            )
        if check is not None:
            check(done.stdout)
        return taken

    return measure


def _imports_torch(command: Sequence[str]) -> bool:
    """Whether a Python program imports torch, by `-X importtime`."""
    program = list(command) if command[0] == sys.executable else [sys.executable, *command]
    program.insert(1, "-Ximporttime")
    done = subprocess.run(
        program, env=_environment(), capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    return any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.stderr.splitlines())


def _worker(
    what: str, rounds: int, *options: str, processes: int = 1, variables: Mapping[str, str] | None = None
) -> Any:
    """Run `worker.py`, with further environment variables, and return what it measured."""
    with tempfile.TemporaryDirectory(prefix="torchport-bench-") as folder:
        out = Path(folder) / "taken.json"
        program = [str(HERE / "worker.py"), what, str(out), "--rounds", str(rounds), *options]
        if processes > 1:
            start = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ]
        else:
            start = [sys.executable]
        done = subprocess.run(
            [*start, *program],
            env=_environment(**(variables or {})),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the benchmark {what!r} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(out.read_text())
