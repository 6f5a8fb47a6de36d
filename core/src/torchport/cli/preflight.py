"""What can be known to fail before any process is started."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from torchport import envvars
from torchport.config.layers import Resolved
from torchport.errors import ConfigurationError, LaunchError
from torchport.plan.decision import Decision
from torchport.plan.registry import Installed
from torchport.plan.request import Request, Sources, find_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.machinery import ModuleSpec

    from torchport.plugin.parallelism import ParallelismConfig


def worker_command(resolved: Resolved, script: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command line of one worker.

    Raises:
        LaunchError: if the script, module or program does not exist.
        ConfigurationError: if `--module` and `--no-python` are both given.
    """
    config = resolved.config
    if config.module and config.no_python:
        raise ConfigurationError("--module and --no-python exclude each other", hint="leave out one of them")
    if config.no_python:
        _check_program(script)
        return (script, *arguments)
    if config.module:
        _check_module(script)
        return (sys.executable, "-m", script, *arguments)
    _check_script(script)
    return (sys.executable, script, *arguments)


def check_shape(resolved: Resolved, num_processes: int) -> None:
    """Check the numbers of processes and machines.

    Raises:
        ConfigurationError: naming where each number came from.
    """
    config, origins = resolved.config, resolved.origins
    for name, value in (("num_processes", num_processes), ("num_machines", config.num_machines)):
        if value < 1:
            raise ConfigurationError(f"{origins.get(name, name)} must be at least 1", found=str(value))
    threads = config.num_cpu_threads_per_process
    if threads is not None and threads < 1:
        raise ConfigurationError(
            f"{origins['num_cpu_threads_per_process']} must be at least 1", found=str(threads)
        )
    if num_processes % config.num_machines:
        raise ConfigurationError(
            f"{num_processes} processes cannot be divided among {config.num_machines} machines",
            reason="num_processes counts those of all machines, and each machine runs the same number",
            hint=f"--num-processes {max(1, num_processes // config.num_machines) * config.num_machines}",
        )
    if not 0 <= config.machine_rank < config.num_machines:
        raise ConfigurationError(
            f"{origins.get('machine_rank', 'machine_rank')} must be from 0 to {config.num_machines - 1}",
            found=str(config.machine_rank),
            reason=f"there are {config.num_machines} machines ({origins.get('num_machines', 'the default')})",
        )
    if config.max_restarts < 0:
        raise ConfigurationError(
            f"{origins['max_restarts']} must not be negative", found=str(config.max_restarts)
        )


def check_values(resolved: Resolved) -> None:
    """Check what every process would refuse in the same way, and say who gave it.

    Raises:
        ConfigurationError: naming the flag, variable or key.
    """
    steps = resolved.config.gradient_accumulation_steps
    if steps is not None and steps < 1:
        origin = resolved.origins["gradient_accumulation_steps"]
        raise ConfigurationError(f"{origin} must be at least 1", found=str(steps))
    timeout = resolved.environ.get(envvars.TIMEOUT)
    if timeout:
        from torchport.config.kwargs import read_timeout

        read_timeout(timeout, envvars.TIMEOUT)


def check_outer_ranks(environ: Mapping[str, str], num_processes: int) -> None:
    """Refuse to start one process, which would train alone, where variables describe one of several.

    A launcher inside the process of another launcher, which has set `LOCAL_RANK`, starts a job of its own.

    Raises:
        LaunchError: with the flags that say the same.
    """
    world_size = environ.get(envvars.WORLD_SIZE, "")
    if (
        num_processes != 1
        or environ.get(envvars.LOCAL_RANK)
        or not world_size.isdigit()
        or int(world_size) < 2
    ):
        return
    names = (envvars.RANK, envvars.WORLD_SIZE, envvars.MASTER_ADDR, envvars.MASTER_PORT)
    raise LaunchError(
        f"{envvars.WORLD_SIZE}={world_size} is set, and this launch is of one process",
        found=", ".join(f"{name}={environ[name]}" for name in names if environ.get(name)),
        reason="the launcher numbers the processes itself: this one would train alone",
        hint=f"unset {envvars.WORLD_SIZE}; or, for one process on each of {world_size} machines:"
        f" --num-processes {world_size} --num-machines {world_size}"
        f" --machine-rank {environ.get(envvars.RANK) or 'N'}"
        f" --main-process-ip {environ.get(envvars.MASTER_ADDR) or 'ADDRESS'}",
    )


def misplaced_flags(
    resolved: Resolved, num_processes: int, script: str, arguments: tuple[str, ...]
) -> tuple[str, ...]:
    """Return one sentence for each number of processes or machines that follows the script and is its own.

    Where the launcher has got that number too, or runs another program than Python, nothing is said.
    """
    if resolved.config.no_python:
        return ()
    sentences = []
    for token, value in zip(arguments, (*arguments, "")[1:], strict=True):
        flag, equals, text = token.partition("=")
        name = "num_processes" if flag == "-n" else flag.removeprefix("--").replace("-", "_")
        counts = name in ("num_processes", "num_machines") and flag.startswith("-")
        if counts and (text if equals else value).isdigit() and name not in resolved.origins:
            number = num_processes if name == "num_processes" else resolved.config.num_machines
            sentences.append(
                f"{flag} after {script} goes to the script; the launch is of {name}={number}:"
                " the launcher's own flags come before the script"
            )
    return tuple(sentences)


def mesh(resolved: Resolved, request: Request, installed: Installed) -> tuple[ParallelismConfig | None, str]:
    """Return the mesh that the launch asks for, and who does; the script may ask for another.

    Raises:
        TorchportError: if it is not valid, or the strategy that the launch asks for cannot lay it out.
    """
    if not request.settings and not any(name.startswith(envvars.PARALLELISM) for name in resolved.environ):
        return None, ""
    from torchport.plan.mesh import check_mesh, mesh_asked_for

    sources = Sources(request, resolved.environ, installed)
    found, source = mesh_asked_for(sources)
    ask = sources.ask("strategy")
    if found is not None and ask is not None:
        spec = find_spec("strategy", ask.value, ask.source, installed)
        settings = sources.settings_of(spec, ask.value)
        strategy = Decision(
            slot="strategy", choice=(spec.name,), source=ask.source, specs=(spec,), config=settings
        )
        check_mesh(found, source, strategy, sources)
    return found, source


def check_port(resolved: Resolved) -> None:
    """Check that the port at which processes meet is free, on the machine that will listen there.

    Raises:
        LaunchError: if it is in use or may not be used.
        ConfigurationError: if it is not a port.
    """
    config, origin = resolved.config, resolved.origins.get("main_process_port", "")
    port = config.main_process_port
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"{origin} must be a TCP port from 1 to 65535", found=str(port))
    if not port or config.machine_rank != 0:
        return
    import socket

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise LaunchError(
            f"{origin} asks for port {port}, which cannot be used",
            reason=error.strerror or str(error),
            hint="another port, or none on a single machine: a free one is taken",
        ) from error


def check_log_dir(resolved: Resolved) -> str:
    """Make the folder for log files if need be, and return its absolute path.

    Raises:
        LaunchError: if nothing can be written there.
    """
    if not resolved.config.log_dir:
        return ""
    import tempfile
    from pathlib import Path

    folder = Path(resolved.config.log_dir).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LaunchError(
            f"{resolved.origins['log_dir']}: nothing can be written in {str(folder)!r}",
            reason=error.strerror or str(error),
        ) from error
    return str(folder)


def _check_script(script: str) -> None:
    if os.path.isfile(script):
        return
    from pathlib import Path

    path = Path(script)
    if path.is_dir():
        if (path / "__main__.py").is_file():
            return
        scripts = sorted(entry.name for entry in path.glob("*.py"))
        raise LaunchError(
            f"the script {script!r} is a folder without a __main__.py",
            found=", ".join(scripts[:5]) or "no Python files in it",
            hint=f"torchport launch {path / scripts[0]}" if scripts else "",
        )
    import difflib

    folder = path.parent
    if not folder.is_dir():
        raise LaunchError(
            f"the script {script!r} does not exist", reason=f"there is no folder {str(folder)!r}"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".py")
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {str(folder / near[0])!r}?" if near else ""
    if not near and "/" not in script and not path.suffix:
        hint = f"for a module: torchport launch -m {script}; for a program: torchport launch --no-python {script}"
    raise LaunchError(
        f"the script {script!r} does not exist",
        found=f"in {str(folder.absolute())!r}: {', '.join(names[:5]) or 'no Python files'}",
        hint=hint,
    )


def _check_program(program: str) -> None:
    import shutil

    if shutil.which(program) is None:
        exists = os.path.exists(program)
        raise LaunchError(
            f"the program {program!r} {'is not executable' if exists else 'was not found'}",
            hint=f"chmod +x {program}, or leave out --no-python" if exists else "its path, such as ./program",
        )


def _check_module(name: str) -> None:
    """Look for a module as `python -m` would, without importing its packages: that may take seconds."""
    sys.path.insert(0, os.getcwd())
    try:
        problem = _find_module(name)
    finally:
        sys.path.pop(0)
    if problem:
        hint = ""
        if name.endswith(".py"):
            hint = f"a module is named without .py; for a file leave out -m: torchport launch {name}"
        raise LaunchError(f"the module {name!r} cannot be run", reason=problem, hint=hint)


def _find_module(name: str) -> str:
    """Say why `python -m name` would fail; empty if it would not."""
    import importlib.util

    parts = name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0]) if all(parts) else None
    except (ImportError, ValueError):
        spec = None
    for end in range(2, len(parts) + 1):
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            return f"{spec.name} is a module, not a package"
        spec = _find_submodule(".".join(parts[:end]), list(spec.submodule_search_locations))
    if spec is None:
        return f"no module named {name!r} in {os.getcwd()!r} or among the installed packages"
    if spec.submodule_search_locations is not None:
        locations = list(spec.submodule_search_locations)
        if _find_submodule(f"{name}.__main__", locations) is None:
            return f"{name!r} is a package without a __main__ module"
    return ""


def _find_submodule(name: str, locations: list[str]) -> ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, locations)
        if spec is not None:
            return spec
    return None
