"""Watching over the workers of one machine: their output, their end, and the signals meant for them.

One thread and one selector; torch is never imported.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from torchport.builtin.console import STDERR, STDOUT, Console, RankStream
from torchport.builtin.processes import (
    FORWARDED,
    Signals,
    cannot_execute,
    describe_exit,
    describe_leavers,
    dying_with_parent,
    exit_code_of,
    terminal_columns,
)
from torchport.errors import LaunchError
from torchport.plugin.launcher import Job

TRACEBACK_HOLD = 0.3
"""Seconds for which a traceback is held back: if nobody dies meanwhile, it was caught and logged."""

CONSEQUENCE_HOLD = 1.0
"""The same for a traceback that comes right after another rank's, or looks like the consequence of one."""

STALE = 5.0
"""Seconds after which a traceback has nothing to do with the end of its process."""

DECISION = 0.3
"""Seconds to wait for the culprit when the first rank to exit seems to have failed because of another."""

LEAVING = 0.4
"""Seconds to wait longer if nobody else has ended: a rank that leaves closes its connections before it ends."""

UNCAUGHT = 0.1
"""Seconds after the beginning of a traceback that nobody caught for which its process may end by itself."""

ENDING = 0.75
"""Seconds after which such a process is killed: importing torch makes the end of Python slow."""

FAULT_GRACE = 0.4
"""Seconds between SIGTERM and SIGKILL for the other ranks after a failure."""

SIGNAL_GRACE = 1.0
"""The same after a signal to the launcher."""

PROMPT_DELAY = 0.15
"""Seconds after which an unfinished line is shown."""

_HEARTBEAT = 1.0


class Worker:
    """One rank: its process, its two streams, and how it ended."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], out: RankStream, err: RankStream) -> None:
        self.rank, self.process, self.out, self.err = rank, process, out, err
        self.returncode: int | None = None
        self.failed_at: float | None = None
        self.ended_at = 0.0

    @property
    def alive(self) -> bool:
        """Whether the process has not been seen to exit."""
        return self.returncode is None

    @property
    def pipes(self) -> Iterable[tuple[IO[bytes], RankStream]]:
        """The ends from which its output is read."""
        for pipe, stream in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            if pipe is not None and not pipe.closed:
                yield pipe, stream

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Supervisor:
    """Runs the workers of a job to their common end.

    Args:
        job: What to run.
        environs: The environment of each worker, in order of rank.
    """

    def __init__(self, job: Job, environs: list[dict[str, str]]) -> None:
        self.job = job
        self.environs = environs
        self.console = Console(prefixed=job.log_prefix)
        self.workers: list[Worker] = []
        self.culprit: Worker | None = None
        self.received: int | None = None
        self._selector = selectors.DefaultSelector()
        self._stopped = 0
        self._ended_before: list[int] = []
        self._cut_short = False
        self._decide_at: float | None = None
        self._kill_at: float | None = None

    def run(self) -> int:
        """Start the workers and wait for all of them.

        Returns:
            0 if all succeeded; the exit code of the first that failed (128 + n if signal n killed it);
            128 + n if the launcher itself was told to stop by signal n.

        Raises:
            LaunchError: if a worker cannot be started.
        """
        with Signals() as signals:
            self._selector.register(signals.descriptor, selectors.EVENT_READ, None)
            try:
                self._start()
                while any(worker.alive for worker in self.workers):
                    self._turn(signals)
                self._finish()
            except BrokenPipeError:  # nobody reads the console any more: end as any program in a pipeline
                return 128 + signal.SIGPIPE
            finally:
                self._kill_all()
                self._selector.close()
        return self._exit_code()

    # --- starting ---

    def _start(self) -> None:
        die_with_parent = dying_with_parent()
        columns = terminal_columns()
        for rank, environ in enumerate(self.environs):
            if columns:
                environ.setdefault("COLUMNS", str(columns - len(f"[rank{rank}]: ") * self.job.log_prefix))
            try:
                process = subprocess.Popen(
                    self.job.command,
                    env=environ,
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise cannot_execute(self.job.command, error) from error
            worker = Worker(rank, process, self._stream(rank, STDOUT), self._stream(rank, STDERR))
            self.workers.append(worker)
            for pipe, stream in worker.pipes:
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, stream)

    def _stream(self, rank: int, descriptor: int) -> RankStream:
        log = None
        if self.job.log_dir:
            name = f"rank{rank}.{'stdout' if descriptor == STDOUT else 'stderr'}.log"
            try:
                log = (Path(self.job.log_dir) / name).open("wb", buffering=0)
            except OSError as error:
                raise LaunchError(f"the log file {name} cannot be written", reason=str(error)) from error
        shown = bool(self.job.tee & descriptor)
        return RankStream(rank, descriptor, self.console, shown=shown, log=log)

    # --- one turn of the loop ---

    def _turn(self, signals: Signals) -> None:
        """Wait for something to happen and deal with it: ends of processes, then output, then clocks."""
        ready = self._selector.select(self._timeout())
        for number in signals.take():
            self._on_signal(number)
        for worker in self.workers:
            if worker.alive:
                self._reap(worker)
        for key, _ in ready:
            if key.data is not None:
                self._read(key.fileobj, key.data)
        now = time.monotonic()
        self._on_clock(now)
        self.console.flush()

    def _timeout(self) -> float:
        deadlines = [self._decide_at and self._decide_at + self._patience(), self._kill_at]
        for worker in self.workers:
            if worker.err.held_since is not None and not self._stopping:
                deadlines.append(worker.err.held_since + self._hold(worker))
            if self._ending(worker):
                deadlines.append((worker.err.uncaught_at or 0.0) + UNCAUGHT)
            for stream in (worker.out, worker.err):
                if stream.partial_since is not None and stream.held_since is None:
                    deadlines.append(stream.partial_since + PROMPT_DELAY)
        nearest = min((d for d in deadlines if d is not None), default=None)
        return _HEARTBEAT if nearest is None else min(_HEARTBEAT, max(0.0, nearest - time.monotonic()))

    def _read(self, pipe: Any, stream: RankStream) -> None:
        """Read what is there; at the end of the stream, stop watching it."""
        if pipe.closed:  # its process has just been reaped
            return
        try:
            data = pipe.read(1 << 16)
        except OSError:
            data = b""
        if data is None:  # nothing there after all
            return
        if data:
            stream.feed(data)
        else:
            self._selector.unregister(pipe)
            pipe.close()

    def _on_clock(self, now: float) -> None:
        for worker in self.workers:
            for stream in (worker.out, worker.err):
                if stream.partial_since is not None and now >= stream.partial_since + PROMPT_DELAY:
                    stream.flush_partial()
            held = worker.err.held_since
            if held is not None and worker.alive and not self._failed and now >= held + self._hold(worker):
                worker.err.release()
            if self._ending(worker) and now >= (worker.err.uncaught_at or 0.0) + UNCAUGHT:
                self._fail(worker)
        if self._decide_at is not None and now >= self._decide_at + self._patience():
            self._decide()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._cut_short = self.culprit is not None and self.culprit.alive
            self._signal_all(signal.SIGKILL)

    def _patience(self) -> float:
        """Seconds to wait longer for whoever has left the others, where nobody else has ended yet."""
        caused = all(worker.err.consequence for worker in self._failed)
        return LEAVING * (caused and all(worker.alive or worker.failed_at for worker in self.workers))

    def _hold(self, worker: Worker) -> float:
        """How long this worker's traceback is held back."""
        mine = worker.err.traceback_at or 0.0
        others = [
            w.err.traceback_at for w in self.workers if w is not worker and w.err.traceback_at is not None
        ]
        follows = any(mine - CONSEQUENCE_HOLD < other < mine for other in others)
        return CONSEQUENCE_HOLD if follows or worker.err.consequence else TRACEBACK_HOLD

    # --- the end of a worker ---

    @property
    def _failed(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.failed_at is not None]

    @property
    def _stopping(self) -> bool:
        return self.culprit is not None or self.received is not None

    def _ending(self, worker: Worker) -> bool:
        """Whether a worker that runs is known to end with a failure, and that has not been dealt with."""
        uncaught = worker.alive and worker.err.uncaught_at is not None
        return uncaught and worker.failed_at is None and not self._stopping

    def _fail(self, worker: Worker) -> None:
        """A worker has failed: settle who failed first, now or when the others have had a moment to show it."""
        worker.failed_at = time.monotonic()
        self._decide_at = self._decide_at or worker.failed_at + DECISION
        if self._certain(worker):
            self._decide()

    def _reap(self, worker: Worker) -> None:
        """Notice that a worker has exited; end what it left running; read its last words."""
        code = exit_code_of(worker.process)
        if code is None:
            return
        # While the exited leader is not reaped, its process group cannot be somebody else's.
        worker.signal_group(signal.SIGKILL if code or self._stopping else signal.SIGTERM)
        worker.returncode, worker.ended_at = worker.process.wait(), time.monotonic()
        for pipe, stream in list(worker.pipes):
            for _ in range(1024):  # what the pipe holds; a process that escaped may keep it open for ever
                if pipe.closed or not self._drain(pipe, stream):
                    break
            if not pipe.closed:
                self._selector.unregister(pipe)
                pipe.close()
        worker.out.close()
        worker.err.close()
        if worker.returncode != 0 and not self._stopping:
            if worker.failed_at is None:
                worker.err.forget_old_traceback(STALE)
                self._fail(worker)
        elif worker.returncode == 0 and not self._stopping:
            worker.err.release()

    def _drain(self, pipe: IO[bytes], stream: RankStream) -> bool:
        try:
            data = pipe.read(1 << 16)
        except OSError:
            return False
        if data:
            stream.feed(data)
        return bool(data)

    def _certain(self, worker: Worker) -> bool:
        """Whether no other rank can still turn out to have failed before this one."""
        if worker.err.consequence:
            return not any(other.alive for other in self.workers)
        mine = worker.err.traceback_at or worker.failed_at or 0.0
        return not any(
            other.alive
            and other.err.traceback_at is not None
            and mine - DECISION < other.err.traceback_at < mine
            for other in self.workers
        )

    def _decide(self) -> None:
        """Settle who failed first, show its error, and stop the others."""
        self._decide_at = None
        if self._stopping:
            return
        self.culprit = min(
            self._failed, key=lambda w: (w.err.consequence, w.err.traceback_at or w.failed_at, w.failed_at)
        )
        self.culprit.err.release()
        for worker in self.workers:
            if worker is not self.culprit:
                worker.err.discard(everything=True)
        first = self.culprit.err.traceback_at or self.culprit.failed_at or 0.0
        self._ended_before = [
            worker.rank
            for worker in self.workers
            if worker.returncode == 0 and (self.culprit.err.consequence or worker.ended_at < first)
        ]
        self._stopped = sum(worker.alive or worker.failed_at is not None for worker in self.workers) - 1
        self._stop(signal.SIGTERM, FAULT_GRACE)
        if self.culprit.alive and self.culprit.err.uncaught_at is not None and self._kill_at is not None:
            self._kill_at = max(self._kill_at, self.culprit.err.uncaught_at + ENDING)

    # --- stopping ---

    def _on_signal(self, number: int) -> None:
        if number in FORWARDED:
            for worker in self.workers:
                if worker.alive:
                    worker.process.send_signal(number)
        elif self.received is not None:
            self._signal_all(signal.SIGKILL)
        else:
            self.received = number
            for worker in self.workers:
                worker.err.discard(everything=False)
            self._stop(number, SIGNAL_GRACE)

    def _stop(self, number: int, grace: float) -> None:
        self._signal_all(number)
        self._kill_at = time.monotonic() + grace

    def _signal_all(self, number: int) -> None:
        for worker in self.workers:
            spared = worker is self.culprit and number == signal.SIGTERM and self.received is None
            if worker.alive and not spared:  # the culprit ends by itself
                worker.signal_group(number)

    def _kill_all(self) -> None:
        """Whatever happens, leave nobody behind."""
        for worker in self.workers:
            if worker.alive:
                worker.signal_group(signal.SIGKILL)
                worker.returncode = worker.process.wait()

    # --- the end of the job ---

    def _finish(self) -> None:
        if self.culprit is None and self._failed and self.received is None:
            self._decide()
        if self.culprit is not None and not self.job.quiet:
            self.culprit.err.release()
            how = describe_exit(self._culprit_code()) + describe_leavers(self._ended_before)
            stopped = {0: "", 1: "; the other rank was stopped"}.get(
                self._stopped, f"; the other {self._stopped} ranks were stopped"
            )
            self.console.say(f"torchport: rank {self.culprit.rank} failed first, {how}{stopped}")
            if self.job.log_dir:
                self.console.say(f"torchport: what each rank printed is in {self.job.log_dir}")
            elif len(self.workers) > 1:
                self.console.say(
                    "torchport: to keep what each rank prints: torchport launch --log-dir DIR ..."
                )
        self.console.flush()

    def _exit_code(self) -> int:
        if self.received is not None:
            return 128 + self.received
        if self.culprit is None:
            return 0
        code = self._culprit_code()
        return code if code > 0 else 128 - code

    def _culprit_code(self) -> int:
        """The exit code of the rank that failed first, or minus the signal that killed it."""
        code = self.culprit.returncode if self.culprit is not None else None
        if code is None or (self._cut_short and code < 0):
            return 1  # what Python returns after an exception that nobody caught
        return code
