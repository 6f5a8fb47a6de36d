"""A function in processes forked from this one: how a notebook, which has no script to start, becomes a job."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchport import envvars
from torchport.builtin.processes import describe_exit, dying_with_parent
from torchport.builtin.supervisor import DECISION, ENDING, FAULT_GRACE, SIGNAL_GRACE
from torchport.checkpoint.background import wait_for_saves
from torchport.errors import WorkerError
from torchport.ops import exchange
from torchport.runtime import Runtime
from torchport.state import GradientState

_KILLED = (-signal.SIGKILL, -signal.SIGSEGV)
"""Exit codes of processes that no other process's failure brings about."""

_OMP_PAUSE_HARD = 2


class Failure(NamedTuple):
    """How a worker failed, and when on the system's monotonic clock."""

    consequence: bool
    at: float
    what: str
    trace: str


class _Worker:
    """One rank: its process, the pipe through which it says how it failed, and what becomes readable at its end."""

    def __init__(self, rank: int, process: Any, pipe: Connection) -> None:
        self.rank, self.process, self.pipe = rank, process, pipe
        self.failure: Failure | None = None
        self.ended = False
        # The sentinel is held open by processes that the worker has started; this is not.
        self._descriptor = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
        self.end: int = process.sentinel if self._descriptor is None else self._descriptor

    def read(self) -> None:
        """Take note of what the worker said before it ended."""
        with contextlib.suppress(EOFError, OSError):
            if self.failure is None and self.pipe.poll():
                self.failure = Failure(*self.pipe.recv())

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it started."""
        if self.ended:
            return
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # it has no group of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def reap(self) -> None:
        """Take note of the end of the process, and end what it has left running."""
        self.read()
        # While the leader is not reaped, its process group cannot be somebody else's.
        self.signal(signal.SIGTERM if self.failure is None else signal.SIGKILL)
        self.process.join()
        self.ended = True
        code = self.process.exitcode
        if code != 0 and self.failure is None:
            self.failure = Failure(code not in _KILLED, time.monotonic(), describe_exit(code), "")

    def close(self) -> None:
        """Let go of everything."""
        self.pipe.close()
        self.process.close()
        if self._descriptor is not None:
            os.close(self._descriptor)


class ForkedWorkers:
    """Runs a function in forked processes to their common end.

    Args:
        function: What to run.
        args: Its arguments; neither they nor the function need be picklable.
        environs: The environment of each worker, in order of rank.
        caller: Name of the function that the user called, for errors.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        environs: Sequence[Mapping[str, str]],
        caller: str,
    ) -> None:
        self.function, self.args, self.environs, self.caller = function, args, environs, caller
        self.workers: list[_Worker] = []

    def run(self) -> None:
        """Start the workers and wait for all of them.

        Raises:
            WorkerError: with the traceback of the worker that failed first; the others have been ended.
        """
        try:
            self._start()
            self._wait()
        except KeyboardInterrupt:
            self._stop(self.workers, signal.SIGINT, SIGNAL_GRACE)
            raise
        finally:
            self._stop(self.workers, signal.SIGKILL, None)
            for worker in self.workers:
                worker.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        arrange = dying_with_parent()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank, environ in enumerate(self.environs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work,
                args=(self.function, self.args, environ, theirs, arrange),
                name=f"{self.caller} rank {environ.get(envvars.RANK, rank)}",
            )
            with _interrupts_later():  # a worker that is not on the list would never be ended
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
                    process.start()
                self.workers.append(_Worker(int(environ.get(envvars.RANK, rank)), process, ours))
            theirs.close()

    def _wait(self) -> None:
        """Wait until all have ended well, or it is clear who failed first."""
        decide_at: float | None = None
        while alive := [worker for worker in self.workers if not worker.ended]:
            timeout = None if decide_at is None else decide_at - time.monotonic()
            if timeout is not None and timeout <= 0:
                break
            ends = {worker.end: worker for worker in alive}
            pipes = {worker.pipe: worker for worker in alive if worker.failure is None}
            for ready in multiprocessing.connection.wait([*ends, *pipes], timeout):
                if isinstance(ready, int):
                    ends[ready].reap()
                elif isinstance(ready, Connection):
                    pipes[ready].read()
            if decide_at is None and any(worker.failure is not None for worker in self.workers):
                decide_at = time.monotonic() + DECISION
        failed = [worker for worker in self.workers if worker.failure is not None]
        if failed:
            culprit = min(failed, key=lambda worker: worker.failure or ())
            self._stop([worker for worker in alive if worker is not culprit], signal.SIGTERM, FAULT_GRACE)
            self._stop([culprit], 0, ENDING)  # it ends by itself
            raise self._error(culprit)

    def _error(self, worker: _Worker) -> WorkerError:
        failure = worker.failure
        assert failure is not None
        return WorkerError(
            f"rank {worker.rank} of {self.caller} failed first: {failure.what}",
            reason=f"\n{failure.trace.rstrip()}" if failure.trace else "",
        )

    @staticmethod
    def _stop(workers: list[_Worker], number: int, grace: float | None) -> None:
        """Send a signal to workers that run, and reap those that end within the grace (`None`: all)."""
        running = [worker for worker in workers if not worker.ended]
        for worker in running:
            worker.signal(number)
        deadline = None if grace is None else time.monotonic() + grace
        for worker in running:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            if multiprocessing.connection.wait([worker.end], timeout):
                worker.reap()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let an interrupt (SIGINT) that comes meanwhile come at the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no interrupt raises an error here
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(signal.SIGINT, came[0])


class WholeLines(io.TextIOBase):
    """A stream that hands text on line by line, so that the lines of several processes do not mix.

    `print` writes a line and its end separately, and what a notebook puts in place of the standard streams sends
    each as it comes. Text without an end of line waits for one, or for `flush`, as progress bars call it.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def writable(self) -> bool:
        """Return `True`."""
        return True

    def isatty(self) -> bool:
        """Whether somebody watches the stream below."""
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        """The descriptor of the stream below."""
        return int(self._stream.fileno())

    def write(self, text: str) -> int:
        """Hand on all whole lines, and keep the rest."""
        lines, end, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if end:
            self._stream.write(lines + end)
        return len(text)

    def flush(self) -> None:
        """Hand on what there is."""
        if self._rest:
            self._stream.write(self._rest)
            self._rest = ""
        self._stream.flush()


def _work(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environ: Mapping[str, str],
    pipe: Connection,
    arrange: Callable[[], None] | None,
) -> None:
    """Be a worker: set up the process, run the function, and say how it failed."""
    os.setsid()
    if arrange is not None:
        arrange()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    enter_worker()
    sys.stdout, sys.stderr = WholeLines(sys.stdout), WholeLines(sys.stderr)
    try:
        _run(function, args)
    except SystemExit as end:
        _report(pipe, end, f"SystemExit: {end.code}")
        _leave(end)
        raise
    except BaseException as error:
        _report(pipe, error, "".join(traceback.format_exception_only(type(error), error)).splitlines()[0])
        _leave(error)
        sys.exit(1)
    else:
        _leave(None)
        if Runtime.current is not None:
            Runtime.current.close()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run the function, and wait for the checkpoint that it may have left to a thread; an error of it is an error."""
    try:
        function(*args)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    wait_for_saves()


def _leave(error: BaseException | None) -> None:
    """Run the exit handlers of this process as a script would: trackers are closed, and what the user registered runs.

    `multiprocessing` has done so only since Python 3.13.
    """
    if error is not None:
        sys.last_value = error  # where handlers look for an error that nobody caught
    atexit._run_exitfuncs()


def _report(pipe: Connection, error: BaseException, what: str) -> None:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    with contextlib.suppress(OSError):  # the parent is gone
        pipe.send((True, time.monotonic(), what, text))


def enter_worker() -> None:
    """Make a forked process a new one: no run, and as many threads as `OMP_NUM_THREADS` says."""
    Runtime.current, Runtime.store, Runtime.generation = None, None, 0
    exchange.reset_group()
    atexit._clear()  # what the notebook has registered is the notebook's
    sys.__dict__.pop("last_value", None)
    GradientState._shared.clear()
    threads = os.environ.get(envvars.THREADS, "")
    torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) > 0 else 1)


def pause_openmp() -> bool:
    """End this process's OpenMP threads until they are needed again, so that it can be forked.

    GNU's OpenMP does not know of forks: a child whose parent has used threads waits for ever for threads that
    it does not have. Other implementations do (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378).

    Returns:
        Whether forked processes can use several threads.
    """
    safe = True
    for library in _mapped_libraries("libgomp"):
        try:
            safe &= ctypes.CDLL(library).omp_pause_resource_all(_OMP_PAUSE_HARD) == 0
        except (OSError, AttributeError):  # OpenMP 5.0 has it, and GCC since 9
            safe = False
    return safe


def _mapped_libraries(name: str) -> set[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines())
    return {path for path in paths if Path(path).name.startswith(name)}
