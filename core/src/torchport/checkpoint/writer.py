"""Write the files of one process; their checksums and their way to the disk run beside the writing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torchport.checkpoint.atomic import checksum, flush

_THREADS = 4  # small files share one commit of the file system's journal if they are flushed together
_FLUSH_EVERY = 0.05  # seconds


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
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="torchport-checkpoint")

    def write(self, name: str, save: Callable[[Path], Any]) -> None:
        """Write a file by calling `save` with its path."""
        path = self.folder / name
        with self._flushed_early(path), _without_zip_checksums():
            save(path)
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
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
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
