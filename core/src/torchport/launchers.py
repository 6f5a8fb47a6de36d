"""Start the processes of a job from within Python: from a notebook, or to debug."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from torchport import envvars
from torchport.aliases import translate_environment
from torchport.builtin.processes import describe_exit
from torchport.builtin.ranks import cores, free_port, rank_variables, without_ranks
from torchport.errors import ConfigurationError, LaunchError, WorkerError
from torchport.forked import ForkedWorkers, enter_worker, pause_openmp
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, choose_backend
from torchport.plugin.specs import Topology
from torchport.runtime import Runtime
from torchport.state import PartialState

_STATIC = "static"


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = _STATIC,
    rdzv_endpoint: str = "",
    rdzv_conf: dict[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Run a training function in several processes, from a notebook.

    The processes are forked: they see everything that the notebook has defined. The function makes the
    `Accelerator`; the notebook must not have one, nor have used the device. A single process runs in place.

    Args:
        function: The training function.
        args: Its arguments.
        num_processes: Number of processes on this machine; by default one per device, one on a CPU.
        mixed_precision: Name of the precision; `"no"` leaves it to the environment.
        use_port: TCP port at which processes meet; `"0"` takes a free one.
        master_addr: Address of the machine of rank 0.
        node_rank: Index of this machine.
        num_nodes: Number of machines, on each of which a notebook calls this.
        rdzv_backend: With another than `"static"`, torchrun's elastic agent starts the processes.
        rdzv_endpoint: Address at which its agents meet; by default `master_addr:use_port`.
        rdzv_conf: Further settings of that.
        rdzv_id: Name of the job there.
        max_restarts: How often to start all processes anew when one fails; on several machines, the elastic
            agent does so.
        monitor_interval: Seconds between the agent's looks at its processes.
        log_line_prefix_template: What the agent puts before lines of output.

    Raises:
        WorkerError: if a process fails, with its traceback; the others are ended.
        LaunchError: if processes cannot be forked here, or a run is open in this one.
        ConfigurationError: if an argument is not valid.
    """
    caller = "notebook_launcher"
    _check_function(function, args, caller)
    if num_processes is None:
        num_processes = _device_count()
    _check_number("num_processes", num_processes, at_least=1)
    _check_number("num_nodes", num_nodes, at_least=1)
    _check_number("max_restarts", max_restarts, at_least=0)
    if not 0 <= node_rank < num_nodes:
        raise ConfigurationError(
            f"node_rank={node_rank} is not the index of one of {num_nodes} machines", hint="they count from 0"
        )
    settings = _precision(mixed_precision, caller)
    elastic = rdzv_backend not in ("", _STATIC) or (max_restarts > 0 and num_nodes > 1)
    if num_processes * num_nodes == 1 and max_restarts == 0 and not elastic:
        _run_in_place(function, args, settings)
        return
    _check_process(caller)
    port = _port(use_port, num_nodes, elsewhere=node_rank > 0 or bool(rdzv_endpoint))
    settings[envvars.THREADS] = _threads(num_processes)
    if not elastic:
        environ = {**without_ranks(os.environ), **settings}
        places = _places(num_processes, node_rank, num_nodes, master_addr, port)
        environs = [{**environ, **rank_variables(place)} for place in places]
        _run_forked(function, args, environs, max_restarts, caller)
        return
    from torch.distributed.launcher.api import LaunchConfig

    config = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=num_processes,
        run_id=rdzv_id,
        role="default",
        rdzv_endpoint=rdzv_endpoint or f"{master_addr}:{port}",
        rdzv_backend=rdzv_backend or _STATIC,
        rdzv_configs={"rank": node_rank, **(rdzv_conf or {})},
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        start_method="fork",
        log_line_prefix_template=log_line_prefix_template,
    )
    _run_elastic(function, args, config, settings, caller)


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> None:
    """Run a function in several processes on the CPU, to see whether it works in more than one.

    Args:
        function: The function; like its arguments, it need not be picklable.
        args: Its arguments.
        num_processes: Number of processes.

    Raises:
        WorkerError: if a process fails, with its traceback; the others are ended.
        LaunchError: if processes cannot be forked here, or a run is open in this one.
        ConfigurationError: if an argument is not valid.
    """
    caller = "debug_launcher"
    _check_function(function, args, caller)
    _check_number("num_processes", num_processes, at_least=1)
    _check_process(caller, backend="cpu")
    settings = {envvars.BACKEND: "cpu", envvars.THREADS: _threads(num_processes)}
    settings |= _origin(envvars.BACKEND, caller)
    environ = {**without_ranks(os.environ), **settings}
    places = _places(num_processes, 0, 1, "127.0.0.1", free_port())
    ForkedWorkers(function, args, [{**environ, **rank_variables(place)} for place in places], caller).run()


# --- the ways to run ---------------------------------------------------------------------------------------------


def _run_in_place(function: Callable[..., Any], args: tuple[Any, ...], settings: Mapping[str, str]) -> None:
    """Run the function in this process, and end the run that it has opened."""
    was_open = Runtime.current is not None
    with _variables(settings):
        try:
            function(*args)
        finally:
            if not was_open:
                PartialState._reset_state()


def _run_forked(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environs: Sequence[Mapping[str, str]],
    max_restarts: int,
    caller: str,
) -> None:
    """Fork and watch the processes ourselves."""
    for attempt in range(max_restarts + 1):
        try:
            ForkedWorkers(function, args, environs, caller).run()
        except WorkerError as error:
            if attempt == max_restarts:
                raise
            print(  # noqa: T201
                f"torchport: {error.problem}; starting anew ({attempt + 1} of {max_restarts})",
                file=sys.stderr,
            )
        else:
            return


def _run_elastic(
    function: Callable[..., Any], args: tuple[Any, ...], config: Any, settings: Mapping[str, str], caller: str
) -> None:
    """Let torchrun's elastic agent fork and watch the processes."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    def work(*args: Any) -> None:
        enter_worker()
        function(*args)

    work.__qualname__ = getattr(
        function, "__qualname__", work.__qualname__
    )  # the agent names it in its report
    with _variables(settings), _own_signal_handlers():
        try:
            elastic_launch(config, work)(*args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            what, trace = _describe(failure)
            attempts = config.max_restarts + 1
            raise WorkerError(
                f"rank {rank} of {caller} failed first, at attempt {attempts} of {attempts}: {what}",
                reason=f"\n{trace.rstrip()}" if trace else "",
            ) from None


def _describe(failure: Any) -> tuple[str, str]:
    """Read how a process failed, and its traceback, from what the agent's processes leave behind."""
    data = (failure.error_file_data or {}).get("message")
    if not isinstance(data, dict):
        return describe_exit(failure.exitcode), ""
    return data.get("message", "").splitlines()[0], data.get("extraInfo", {}).get("py_callstack", "")


@contextlib.contextmanager
def _variables(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Give the notebook back the handlers that the elastic agent replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what the processes are told ---------------------------------------------------------------------------------


def _places(
    num_processes: int, node_rank: int, num_nodes: int, address: str, port: int
) -> Iterator[Topology]:
    for local_rank in range(num_processes):
        yield Topology(
            rank=node_rank * num_processes + local_rank,
            world_size=num_nodes * num_processes,
            local_rank=local_rank,
            local_world_size=num_processes,
            node_rank=node_rank,
            num_nodes=num_nodes,
            master_addr=address,
            master_port=port,
        )


def _precision(name: str, caller: str) -> dict[str, str]:
    name = str(getattr(name, "value", name)).lower()
    return {} if name == "no" else {envvars.PRECISION: name, **_origin(envvars.PRECISION, caller)}


def _origin(variable: str, caller: str) -> dict[str, str]:
    """Let errors about a variable name the function that has set it."""
    return {envvars.ORIGINS: envvars.format_origins({**envvars.origins(os.environ), variable: caller})}


def _threads(num_processes: int) -> str:
    """Return the number of threads of each process: the user's, its share of the cores, or 1 where more would hang."""
    if not pause_openmp():
        return "1"
    return os.environ.get(envvars.THREADS) or str(max(1, cores() // num_processes))


def _device_count() -> int:
    environ = translate_environment(os.environ)
    installed = discover(environ)
    backend = choose_backend(Request(asked_by="notebook_launcher"), environ, installed).spec
    return max(1, installed.probe(backend).count)


def _port(use_port: str | int, num_nodes: int, *, elsewhere: bool) -> int:
    """Return the port to meet at, after seeing that nothing else listens on it."""
    text = str(use_port)
    if not text.isdigit() or int(text) > 65535:
        raise ConfigurationError(f"use_port={use_port!r} is not a TCP port")
    port = int(text)
    if port == 0:
        if num_nodes > 1:
            raise ConfigurationError("use_port='0' takes any port, and all machines must know which")
        return free_port()
    if not elsewhere:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise LaunchError(
                    f"the processes cannot meet at port {port} (use_port)",
                    reason=error.strerror or str(error),
                    hint="use_port='0' takes a free one",
                ) from error
    return port


# --- what is refused ---------------------------------------------------------------------------------------------


def _check_function(function: Any, args: Any, caller: str) -> None:
    if not callable(function):
        raise ConfigurationError(f"{caller} needs a function to run", found=repr(function))
    if not isinstance(args, (tuple, list)):
        raise ConfigurationError(
            f"{caller}(args={args!r}) is not a tuple of arguments", hint=f"args=({args!r},)"
        )


def _check_number(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigurationError(f"{name}={value!r} must be a whole number, at least {at_least}")


def _check_process(caller: str, backend: str | None = None) -> None:
    """Refuse to fork a process that holds what its children must open for themselves."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise LaunchError(
            f"{caller} cannot start processes here",
            reason="this operating system cannot fork a process",
            hint="write the function into a script, and start it with torchport launch",
        )
    if Runtime.current is not None or dist.is_initialized():
        what = "a process group" if Runtime.current is None else "an Accelerator or PartialState"
        raise LaunchError(
            f"{caller} cannot start processes from one that has {what} already",
            reason="each of its processes makes its own, inside the function",
            hint="move it into the function, and restart the notebook's kernel",
        )
    device_type = _initialized_device()
    if device_type is None:
        return
    environ = translate_environment(os.environ)
    arguments = {"backend": backend} if backend is not None else {}
    chosen = choose_backend(Request(arguments=arguments, asked_by=caller), environ, discover(environ)).spec
    if getattr(chosen, "device_type", None) == device_type:
        raise LaunchError(
            f"{caller} cannot start processes from one that has used the device",
            found=f"torch.{device_type} is initialized",
            reason="a forked process cannot use a device that its parent has opened",
            hint="restart the notebook's kernel, and use the device inside the function only",
        )


def _initialized_device() -> str | None:
    """Return the type of the accelerator whose runtime this process has started."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    started = getattr(torch.get_device_module(accelerator.type), "is_initialized", None)
    return accelerator.type if started is not None and started() else None
