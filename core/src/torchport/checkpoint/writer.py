"""Write the files of one process; their checksums and their way to the disk run beside the writing."""

from __future__ import annotations

import errno
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torchport.checkpoint.atomic import checksum, flush

_THREADS = 4  # small files share one commit of the file system's journal if they are flushed together
_FLUSH_EVERY = 0.05  # seconds
_PROBE = 1 << 20  # bytes that a file system which is not full takes


class FolderWriter:
    """Writes files into a folder, one at a time, each on the disk and with a known checksum when the block ends.

    While a file is written, what there is of it is flushed already; while the next one is written, its checksum is
    computed. A checksum is that of the bytes read back from the file.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self._settled: dict[str, tuple[Future[None], Future[str]]] = {}
        self._pool = _Threads(_THREADS)

    def write(self, name: str, save: Callable[[Path], Any]) -> None:
        """Write a file by calling `save` with its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._flushed_early(path), _without_zip_checksums():
                save(path)
        except Exception as error:
            refusal = _refusal(error, path)
            with suppress(OSError):  # PyTorch's writer keeps the file open, and with it the space of the disk
                os.truncate(path, 0)
            if refusal is None or isinstance(error, OSError):
                raise
            raise refusal from error
        self._settled[name] = (self._pool.submit(flush, path), self._pool.submit(checksum, path))

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is on the disk; then `files` has size and checksum of each file by name.

        Raises:
            OSError: if a file could not be flushed or read back.
        """
        self._pool.shutdown(cancel=error is not None)
        if error is not None:
            return
        for name, (flushed, read) in self._settled.items():
            flushed.result()
            self.files[name] = {"size": (self.folder / name).stat().st_size, "crc32": read.result()}

    @contextmanager
    def _flushed_early(self, path: Path) -> Iterator[None]:
        """Keep the disk busy while a large file is being written."""
        written = threading.Event()

        def follow() -> None:
            while not written.wait(_FLUSH_EVERY):
                if path.exists():
                    flush(path)

        following = self._pool.submit(follow)
        try:
            yield
        finally:
            written.set()
            following.cancel()


def _refusal(error: Exception, path: Path) -> OSError | None:
    """Find out whether the system takes no more of a file, such as on a full disk; not all writers say so."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])), path.name)
    try:
        with path.open("ab") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return OSError(refused.errno, os.strerror(refused.errno or errno.EIO), path.name)
    return None


class _Threads:
    """A few threads that do what they are given, also while the interpreter waits for its threads to exit.

    An executor of `concurrent.futures` takes no work then, and a save in the background may still go on.
    """

    def __init__(self, number: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"torchport-checkpoint-{index}", daemon=True)
            for index in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called; the future has its result."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def shutdown(self, *, cancel: bool) -> None:
        """Wait until all is done, or, if asked, until what has begun is done."""
        if cancel:
            with suppress(queue.Empty):
                while True:
                    self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """Leave out the checksums inside `torch.save`'s archives: the manifest has one of the whole file."""
    options = torch.serialization
    if not hasattr(options, "set_crc32_options"):
        yield
        return
    before = options.get_crc32_options()
    options.set_crc32_options(False)
    try:
        yield
    finally:
        options.set_crc32_options(before)
