"""What a supervisor needs of the operating system: signals to wait for, ends of processes, the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchport.errors import LaunchError

if TYPE_CHECKING:
    import subprocess

FORWARDED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals whose meaning is the script's own affair (a cluster's notice before the end of its time)."""

_PR_SET_PDEATHSIG = 1


class Signals:
    """Turns signals into something that a selector can wait for, while it is open."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.descriptor, self._writer = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, *FORWARDED]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        for number in wanted:
            self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.descriptor)
        os.close(self._writer)

    def take(self) -> list[int]:
        """Return the signals that came since the last call, without those about children."""
        try:
            return [number for number in os.read(self.descriptor, 4096) if number != signal.SIGCHLD]
        except BlockingIOError:
            return []


def exit_code_of(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of `process`, minus the signal that killed it, or `None` if it runs.

    The process is not reaped where the system allows that.
    """
    if not hasattr(os, "waitid"):
        return process.poll()
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def terminal_columns() -> int:
    """Return the width of the terminal that the workers' output ends up on; 0 if there is none."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(descriptor).columns
    return 0


def dying_with_parent() -> Callable[[], None] | None:
    """Return what a new process must do so that it dies with this one (Linux: prctl(2)); `None` elsewhere."""
    import ctypes

    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return arrange


def cannot_execute(command: tuple[str, ...], error: OSError) -> LaunchError:
    """Say that a program cannot be executed, and why."""
    return LaunchError(
        f"{command[0]!r} cannot be executed",
        reason=error.strerror or str(error),
        hint="a program run with --no-python must be executable and start with a line such as #!/bin/sh",
    )


def describe_exit(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    advice = {
        "SIGKILL": ": was the machine out of memory? (dmesg | grep -i oom)",
        "SIGBUS": ": is shared memory full? (df -h /dev/shm)",
        "SIGSEGV": ": PYTHONFAULTHANDLER=1 shows where",
    }.get(name, "")
    return f"killed by {name}{advice}"


def describe_leavers(ranks: list[int]) -> str:
    """Name the ranks that have left the others although nothing failed in them."""
    if not ranks:
        return ""
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"; {who} had ended with exit code 0 before"
