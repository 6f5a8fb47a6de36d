"""The MPI library of this process, and the thread that drives its operations.

Every operation is a nonblocking MPI call. It is issued by the thread that asks for it, so that the calls on
each communicator have the order of the program; whoever waits for it, and otherwise one thread in the background,
tests it until it is complete or late. All MPI calls are made under one lock: `MPI_THREAD_SERIALIZED` suffices.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from torchport.errors import LaunchError, TorchportError

from torchport_cpu.mpi_probe import INSTALL, flavour_of

if TYPE_CHECKING:
    from torchport_cpu.mpi_work import MpiWork

_SPINS = 200
"""How often a waiting thread tests before it starts to sleep between tests."""
_SHORTEST, _LONGEST = 20e-6, 1e-3
"""Bounds of the sleep between two tests, in seconds."""
_yield_core = getattr(os, "sched_yield", None) or (lambda: time.sleep(0))


class Engine:
    """The MPI library of this process.

    Attributes:
        mpi: The module `mpi4py.MPI`.
        lock: Held during every MPI call.
        world: A copy of `COMM_WORLD` of our own, its ranks in the order of the job's topology; set by `meet`.
    """

    current: ClassVar[Engine | None] = None

    def __init__(self) -> None:
        self.mpi = _load()
        self.lock = threading.RLock()
        self.world: Any = None
        self._active: list[MpiWork] = []
        self._abandoned: list[MpiWork] = []
        self._waiting = 0
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="torchport-mpi", daemon=True)
        self._thread.start()
        self._excepthook = sys.excepthook
        sys.excepthook = self._abort_after
        atexit.register(self.close)

    @classmethod
    def start(cls) -> Engine:
        """Return this process's engine, initialising MPI at the first call.

        Raises:
            TorchportError: if no MPI library can be used.
        """
        if cls.current is None:
            cls.current = cls()
        return cls.current

    # --- operations --------------------------------------------------------------------------------------

    def add(self, work: MpiWork, *, awaited: bool) -> None:
        """Take over an issued operation; call it under `lock`.

        Args:
            work: The operation.
            awaited: Whether the calling thread is about to wait for it, so that no other need drive it.
        """
        self._active.append(work)
        if not awaited:
            self._wake.set()

    def poll(self) -> None:
        """Test all operations once."""
        with self.lock:
            over = [work for work in self._active if work.advance(self.mpi)]
            for work in over:
                self._active.remove(work)
        for work in over:
            work.publish()

    def drive(self, done: threading.Event, limit: float | None) -> bool:
        """Test operations until `done` is set; return whether it was within `limit` seconds."""
        deadline = None if limit is None else time.monotonic() + limit
        tries, pause = 0, _SHORTEST
        with self.lock:
            self._waiting += 1
        try:
            while True:
                self.poll()
                if done.is_set():
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                tries += 1
                if tries <= _SPINS:
                    _yield_core()
                else:
                    time.sleep(pause)
                    pause = min(pause * 1.5, _LONGEST)
        finally:
            with self.lock:
                self._waiting -= 1
            if self._active:
                self._wake.set()

    def abandon(self, work: MpiWork) -> None:
        """Keep the buffers of an operation that will never complete: MPI may still write to them."""
        self._abandoned.append(work)

    def outstanding(self, group: Any) -> list[MpiWork]:
        """Return the operations of a group that are under way."""
        return [work for work in self._active if work.group is group]

    def _run(self) -> None:
        pause = _SHORTEST
        while not self._stopped:
            if not self._active:
                self._wake.wait()
                self._wake.clear()
                pause = _SHORTEST
                continue
            if not self._waiting:
                before = len(self._active)
                self.poll()
                pause = _SHORTEST if len(self._active) != before else min(pause * 1.5, _LONGEST)
            time.sleep(_LONGEST if self._waiting else pause)

    # --- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop driving operations; mpi4py finalises MPI afterwards.

        Where operations were abandoned, finalising would wait for them for ever: the job is aborted instead.
        """
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=5)
        if self._abandoned and not self.mpi.Is_finalized():
            print(  # noqa: T201
                f"torchport: {self._abandoned[0].describe()} never completed; the MPI job is aborted",
                file=sys.stderr,
                flush=True,
            )
            _abort_at_exit(1)

    def _abort_after(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        """Report an uncaught error as usual, then end the whole job: the other ranks wait for this one."""
        self._excepthook(kind, error, traceback)
        _abort_at_exit(error if isinstance(error, KeyboardInterrupt) else 1)


def _abort_at_exit(status: object) -> None:
    """Make mpi4py call `MPI_Abort` instead of `MPI_Finalize` when the interpreter ends."""
    from mpi4py.run import set_abort_status

    set_abort_status(status)


def _load() -> Any:
    """Import mpi4py, initialise MPI unless that is done, and check its thread level."""
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError) as error:
        raise TorchportError(
            "collectives 'mpi' want an MPI library", reason=str(error).splitlines()[0], hint=INSTALL
        ) from error
    if mpi.Is_finalized():
        raise TorchportError("collectives 'mpi' want MPI", reason="it has been finalised in this process")
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise LaunchError(
            "collectives 'mpi' want MPI to be callable from several threads",
            found=f"{flavour_of(mpi.Get_library_version())}, initialised without MPI_THREAD_SERIALIZED",
            hint='leave mpi4py.rc.thread_level at "multiple"',
        )
    return mpi
