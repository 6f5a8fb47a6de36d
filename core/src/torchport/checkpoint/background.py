"""Saving while training goes on: a thread, and how those of all processes agree without the process group.

Collective operations belong to the main thread, which is training. The threads exchange values through the key-value
store at which the processes met. Each says every second that it is alive, so that none waits for a process that
has ended.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from torchport.errors import CheckpointError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT = 1.0
"""Seconds between two signs of life of a process that is saving."""

LOST = 60.0
"""Seconds without a sign of life after which a process counts as ended."""

_POLL = (0.002, 0.1)  # seconds between two looks at the store: the first and the longest


def own_client(store: Store | None) -> Store | None:
    """Return another client of a store: another thread may wait for a key, and clients do one thing at a time.

    Call it while all processes are known to live: once rank 0 has ended, connecting takes as long as the store's
    timeout.
    """
    return store.clone() if store is not None and hasattr(store, "clone") else store


class StoreExchange:
    """Gathers values of all processes through their key-value store; for threads other than the main one.

    Args:
        store: This process's own client of the store that all processes share (`own_client`); `None` where there is
            one process.
        name: What tells this exchange from others, the same on every process.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, store: Store | None, name: str, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._name = f"torchport/checkpoint/{name}"
        self._store: Any = store
        self._round = 0
        self._ended = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._lost: set[int] = set()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> StoreExchange:
        if self.world_size > 1:
            self._beating = threading.Thread(target=self._beat, name="torchport-checkpoint-beat", daemon=True)
            self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part: the process that has the store waits until the others have read what they need."""
        try:
            if self.world_size > 1:
                self._part()
        except RuntimeError:  # the store is gone, and with it all that could be cleaned up
            pass
        finally:
            self._ended.set()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank.

        A process that has ended counts as one that failed: `(error, None)` stands for its value.

        Raises:
            CheckpointError: if the process that collects them has ended.
        """
        if self.world_size == 1:
            return [value]
        self._round += 1
        key = str(self._round)
        try:
            self._store.set(self._key(f"{key}/{self.rank}"), pickle.dumps(value))
            if self.rank:
                told = self._await({0: f"{key}/all"})
                if not told:
                    raise CheckpointError(*_lost(0))
                values: list[Any] = pickle.loads(told[0])
                return values
            ranks = range(self.world_size)
            told = self._await({rank: f"{key}/{rank}" for rank in ranks})
            values = [
                pickle.loads(told[rank]) if rank in told else (CheckpointError(*_lost(rank)), None)
                for rank in ranks
            ]
            self._store.set(self._key(f"{key}/all"), pickle.dumps(values))
            return values
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            raise CheckpointError(
                "the processes' key-value store cannot be reached: rank 0 has ended",
                reason=str(error).splitlines()[0],
            ) from error

    def _await(self, keys: dict[int, str]) -> dict[int, bytes]:
        """Return the values of keys that processes set, by rank, without those of processes that have ended.

        All are waited for together, and none that has been lost is waited for again.
        """
        pause, longest = _POLL
        told: dict[int, bytes] = {}
        waiting = {rank: self._key(key) for rank, key in keys.items()}
        self._heard.clear()
        while True:
            for rank, place in list(waiting.items()):
                if self._store.check([place]):
                    told[rank] = self._store.get(place)
                elif rank == self.rank or self._is_alive(rank):
                    continue
                del waiting[rank]
            if not waiting:
                return told
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _is_alive(self, rank: int) -> bool:
        if rank in self._lost:
            return False
        place = self._key(f"alive/{rank}")
        beat: bytes = self._store.get(place) if self._store.check([place]) else b""
        before = self._heard.get(rank)
        now = time.monotonic()
        if before is None or before[0] != beat:
            self._heard[rank] = (beat, now)
            return True
        if now - before[1] >= LOST:
            self._lost.add(rank)
        return rank not in self._lost

    def _beat(self) -> None:
        number = 0
        try:
            while not self._ended.wait(BEAT if number else 0):
                number += 1
                self._store.set(self._key(f"alive/{self.rank}"), str(number))
        except RuntimeError:  # the store is gone; whoever waits for it will say so
            pass

    def _part(self) -> None:
        if self.rank:
            self._fall_silent()
        self._store.set(self._key(f"parted/{self.rank}"), "1")
        if self.rank:
            return
        ranks = range(self.world_size)
        self._await({rank: f"parted/{rank}" for rank in ranks})
        self._fall_silent()
        names = [f"{kind}/{rank}" for kind in ("alive", "parted") for rank in ranks]
        rounds = range(1, self._round + 1)
        names += [f"{number}/{place}" for number in rounds for place in (*ranks, "all")]
        for name in names:
            self._store.delete_key(self._key(name))

    def _fall_silent(self) -> None:
        self._ended.set()
        if self._beating is not None:
            self._beating.join()

    def _key(self, name: str) -> str:
        return f"{self._name}/{name}"


def _lost(rank: int) -> tuple[str]:
    return (f"rank {rank} has ended, or has not been heard of for {LOST:g} seconds",)


class BackgroundSave:
    """A save that runs in a thread; the interpreter does not exit before it has ended.

    Args:
        save: What to run.
        target: The checkpoint that it writes, for errors.
    """

    def __init__(self, save: Callable[[], Any], target: str) -> None:
        self.target = target
        self._save = save
        self._error: BaseException | None = None
        _unchecked.append(self)
        atexit.register(self._report)
        self._thread = threading.Thread(target=self._run, name="torchport-checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._save()
        except BaseException as error:
            self._error = error
        finally:
            del self._save  # and the snapshot with it

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def check(self) -> None:
        """Say, once, how it has ended.

        Raises:
            CheckpointError: if it failed.
        """
        atexit.unregister(self._report)
        if self in _unchecked:
            _unchecked.remove(self)
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            raise CheckpointError(
                error.problem, found=error.found, reason=error.reason, hint=error.hint
            ) from error
        if error is not None:
            raise CheckpointError(
                f"the checkpoint {self.target} could not be saved", found=f"{type(error).__name__}: {error}"
            ) from error

    def _report(self) -> None:
        """Say at the end of the program that it failed, where nobody has asked, and let its exit status be 120."""
        try:
            self.join()
            self.check()
        except CheckpointError as error:
            print(f"torchport: {error}", file=sys.stderr)  # noqa: T201
            if sys.stderr is not None:
                sys.stderr = cast(TextIO, _FailedCleanup(sys.stderr))


_unchecked: list[BackgroundSave] = []
"""Saves of this process of which nobody has asked how they ended."""

os.register_at_fork(after_in_child=_unchecked.clear)


def wait_for_saves() -> None:
    """Wait until all saves in the background have ended, where nobody has; for a process that is about to end.

    Raises:
        CheckpointError: if one failed; the first of several.
    """
    while _unchecked:
        save = _unchecked[0]
        save.join()
        save.check()


class _FailedCleanup:
    """Standard error that the interpreter fails to flush as it ends: the exit status is 120 then (`sys.exit`).

    Python has no other way from an exit handler to a status: it has been decided by then. All handlers still run.

    Args:
        stream: Standard error, which takes all that is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        """Flush; raise if the interpreter itself asks, which no Python code has called."""
        self._stream.flush()
        if sys._getframe().f_back is None:
            raise OSError("a checkpoint could not be saved")
