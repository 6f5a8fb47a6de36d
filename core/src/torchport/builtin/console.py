"""What the workers of a job print: split into lines, logged, prefixed, and shown on one console.

A traceback is held back for a moment. When one rank fails, the others often fail because of it, and print
their errors first; so the supervisor decides whose traceback is shown once it knows who failed.
"""

from __future__ import annotations

import os
import re
import time
from typing import BinaryIO

STDOUT, STDERR = 1, 2

_END = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)
"""The end of a line, or of what a progress bar overwrites; a carriage return at the very end waits for what follows."""

_TRACEBACK = re.compile(
    rb"(?:\[rank\d+\]: ?)?[ +|]*(?:Exception Group )?Traceback \(most recent call last\):"
)
_CONSEQUENCE = re.compile(
    rb"[Cc]onnection (?:was )?(?:closed|reset|refused|aborted)|[Bb]roken pipe|closed by peer"
    rb"|remote process exited|DistNetworkError|ECONNRESET|EPIPE"
)
"""What an error says that is usually the consequence of another process's end."""

_LONGEST = 1 << 16
_ERASE = b"\x1b[K"


class Console:
    """The launcher's standard output and error, shared by all ranks.

    Args:
        prefixed: Whether each line starts with the rank that wrote it.
    """

    def __init__(self, *, prefixed: bool) -> None:
        self.prefixed = prefixed
        self._terminal = {descriptor: os.isatty(descriptor) for descriptor in (STDOUT, STDERR)}
        same = os.path.sameopenfile(STDOUT, STDERR) if _both_open() else False
        self._cursor = {STDOUT: STDOUT, STDERR: STDOUT if same else STDERR}
        self._midline: dict[int, RankStream | None] = {}
        self._returned: set[int] = set()
        self._pending: list[tuple[int, bytes]] = []

    def show(self, stream: RankStream, segment: bytes) -> None:
        """Queue a line, or the beginning of one, as written by one stream of one rank."""
        cursor = self._cursor[stream.descriptor]
        owner = self._midline.get(cursor)
        start = b""
        if owner is not stream:
            if segment == b"\r":
                return
            start = b"\n" * (owner is not None)
            if cursor in self._returned and self._terminal[stream.descriptor]:
                start += _ERASE
            if self.prefixed and not segment.startswith(stream.own_prefix):
                start += stream.prefix
        self._midline[cursor] = None if segment.endswith((b"\n", b"\r")) else stream
        self._returned.discard(cursor)
        if segment.endswith(b"\r"):
            self._returned.add(cursor)
        self._pending.append((stream.descriptor, start + segment))

    def say(self, text: str) -> None:
        """Queue a line of the launcher's own, on standard error."""
        cursor = self._cursor[STDERR]
        start = b"\n" if self._midline.get(cursor) is not None or cursor in self._returned else b""
        self._midline[cursor] = None
        self._returned.discard(cursor)
        self._pending.append((STDERR, start + text.encode(errors="replace") + b"\n"))

    def flush(self) -> None:
        """Write what is queued.

        Raises:
            BrokenPipeError: if nobody reads it any more.
        """
        pending, self._pending = self._pending, []
        index = 0
        while index < len(pending):
            descriptor, parts = pending[index][0], []
            while index < len(pending) and pending[index][0] == descriptor:
                parts.append(pending[index][1])
                index += 1
            data = memoryview(b"".join(parts))
            while data:
                data = data[os.write(descriptor, data) :]


class RankStream:
    """One output stream of one rank.

    Args:
        rank: The rank.
        descriptor: `STDOUT` or `STDERR`.
        console: Where it is shown.
        shown: Whether it is.
        log: File that gets everything as it was written, or `None`.
    """

    def __init__(
        self, rank: int, descriptor: int, console: Console, *, shown: bool, log: BinaryIO | None
    ) -> None:
        self.descriptor = descriptor
        self.prefix = f"[rank{rank}]: ".encode()
        self.own_prefix = f"[rank{rank}]:".encode()
        self.traceback_at: float | None = None
        self.uncaught_at: float | None = None
        self.consequence = False
        self.held_since: float | None = None
        self.partial_since: float | None = None
        self._console, self._shown, self._log = console, shown, log
        self._partial = b""
        self._continues = False
        self._held: list[bytes] = []
        self._dropping = self._muted = False

    def feed(self, data: bytes) -> None:
        """Take what the rank wrote."""
        if self._log is not None:
            self._log.write(data)
        if not self._shown and self.descriptor == STDOUT:
            return
        text, end = self._partial + data, 0
        for match in _END.finditer(text):
            start, end = end, match.end()
            self._take(text[start:end])
        self._partial = text[end:]
        if len(self._partial) > _LONGEST:
            self.flush_partial()
        self.partial_since = time.monotonic() if self._partial else None

    def flush_partial(self) -> None:
        """Show an unfinished line (a prompt, a progress bar), unless a traceback is being held."""
        if self._partial and self.held_since is None:
            partial, self._partial = self._partial, b""
            self._take(partial)
        self.partial_since = None

    def close(self) -> None:
        """End the stream: the rank has exited."""
        if self._partial:
            partial, self._partial = self._partial, b""
            self._take(partial if partial.endswith((b"\r", b"\n")) else partial + b"\n")
        self.partial_since = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def release(self) -> None:
        """Show the traceback that is being held, and go on."""
        held, self._held, self.held_since = self._held, [], None
        for segment in held:
            self._console.show(self, segment)

    def forget_old_traceback(self, age: float) -> None:
        """Forget when a traceback was printed if that was long ago: it was caught, and says nothing now."""
        if (
            self.held_since is None
            and self.traceback_at is not None
            and time.monotonic() - self.traceback_at > age
        ):
            self.traceback_at, self.consequence = None, False

    def discard(self, *, everything: bool) -> None:
        """Drop the traceback that is being held and those to come; with `everything`, all that is to come."""
        self._dropping, self._muted = True, everything or self._muted or self.held_since is not None
        self._held, self.held_since = [], None

    def _take(self, segment: bytes) -> None:
        if self._muted:
            return
        starts = not self._continues
        self._continues = not segment.endswith((b"\n", b"\r"))
        if self.descriptor == STDERR:
            if self.held_since is None and starts and _TRACEBACK.match(segment):
                self.held_since = time.monotonic()
                self.traceback_at, self.consequence = self.held_since, False
                # PyTorch puts the rank before each line of what nobody caught: the process is ending.
                self.uncaught_at = self.held_since if segment.startswith(self.own_prefix) else None
                self._muted = self._dropping
                if self._muted:
                    self.held_since = None
                    return
            if self.held_since is not None:
                self.consequence = self.consequence or bool(_CONSEQUENCE.search(segment))
                if segment.strip() and not segment.startswith(self.own_prefix):
                    self.uncaught_at = None
                self._held.append(segment)
                return
        if self._shown:
            self._console.show(self, segment)


def _both_open() -> bool:
    try:
        os.fstat(STDOUT)
        os.fstat(STDERR)
    except OSError:
        return False
    return True
