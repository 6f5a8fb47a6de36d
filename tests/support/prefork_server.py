"""Start Python programs by forking a process that has imported PyTorch already.

    python prefork_server.py FOLDER/NAME MODULES...

imports the modules, listens on the socket FOLDER/NAME, and returns: the server goes on in the background until nobody
holds FOLDER/alive open for writing. `prefork_client.py` is what stands for the interpreter.

Each program runs in a process and a session of its own, from its first line to the interpreter's exit: the working
folder, the variables, the standard streams, `sys.argv` and `sys.path` are those of the client. What processes of the
same server share is what an interpreter fixes when it starts, such as the seed of string hashes, and the modules that
were imported before the fork. Programs that start `sys.executable` start new interpreters, unless the variable
PREFORK_EXECUTABLE names another program.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

SIZE, FILES = 1 << 20, 64
"""How many bytes are read at once, and the most open files that a client may have."""

HIGH = 256
"""Above the numbers of files that a client was given."""


def receive(connection: socket.socket) -> tuple[dict, Sequence[int]]:
    """Read one request: a line of JSON, and open files that come with its first byte."""
    data, files, _, _ = socket.recv_fds(connection, SIZE, FILES)
    while data and not data.endswith(b"\n"):
        data += connection.recv(SIZE)
    return json.loads(data), files


class Server:
    """Forks one process for each connection, and says there how it ended.

    Attributes:
        address: Path of the socket.
        connections: The client of each running process.
    """

    def __init__(self, address: Path) -> None:
        self.address = address
        self.connections: dict[int, socket.socket] = {}

    def open(self, modules: Sequence[str]) -> None:
        """Import the modules, then listen.

        Raises:
            RuntimeError: if one of them has started a thread, which would be lost in what is forked.
        """
        for module in modules:
            importlib.import_module(module)
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(f"{modules} run {threads - 1} threads: processes cannot be forked from here")
        gc.collect()
        gc.freeze()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.address))
        self.listener.listen(64)

    def serve(self) -> dict:
        """Fork processes until nobody needs them; return, in each of them, what it is to run."""
        alive = os.open(self.address.parent / "alive", os.O_RDONLY)
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        selector = selectors.DefaultSelector()
        selector.register(alive, selectors.EVENT_READ, "alive")
        selector.register(wake, selectors.EVENT_READ, "children")
        selector.register(self.listener, selectors.EVENT_READ, "client")
        while True:
            for key, _ in selector.select():
                if key.data == "alive":
                    for pid in self.connections:
                        _kill(pid)
                    sys.exit(0)
                elif key.data == "children":
                    os.read(wake, 4096)
                    self._report(selector)
                elif key.data == "client":
                    connection, _ = self.listener.accept()
                    request, files = receive(connection)
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for handle in (alive, wake, woken):
                            os.close(handle)
                        for other in (selector, self.listener, connection, *self.connections.values()):
                            other.close()
                        return {**request, "files": dict(zip(request["files"], files, strict=True))}
                    for file in files:
                        os.close(file)
                    connection.sendall(f"{pid}\n".encode())
                    self.connections[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                elif key.data in self.connections:  # the client was killed
                    selector.unregister(key.fileobj)
                    _kill(key.data)

    def _report(self, selector: selectors.BaseSelector) -> None:
        while self.connections:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            connection = self.connections.pop(pid)
            with contextlib.suppress(KeyError):
                selector.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def _kill(pid: int) -> None:
    """End a process and all of its session that stayed in its group."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


def become(request: dict) -> None:
    """Make this process what the interpreter of the client would be."""
    os.setsid()
    arrived = {number: fcntl.fcntl(file, fcntl.F_DUPFD, HIGH) for number, file in request["files"].items()}
    for file in request["files"].values():
        os.close(file)
    for number, file in arrived.items():
        os.dup2(file, number)
        os.close(file)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) or request["arguments"][0] == "-u"
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = os.fdopen(number, "w", closefd=False, errors=errors)
        stream.reconfigure(line_buffering=number == 2 or os.isatty(number), write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.executable = os.environ.get("PREFORK_EXECUTABLE", sys.executable)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    for option in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings._processoptions([option])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    here = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [os.path.abspath(folder) for folder in here.split(os.pathsep) if folder]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()


def run(arguments: list[str]) -> None:
    """Run `[-u] SCRIPT ...` or `[-u] -m MODULE ...` as the main module of this process."""
    if arguments[0] == "-u":
        del arguments[0]
    if arguments[0] == "-m":
        import runpy

        sys.path.insert(0, os.getcwd())
        sys.argv[:] = arguments[1:]
        runpy._run_module_as_main(arguments[1])
        return
    script = arguments[0]
    sys.argv[:] = arguments
    sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    main = types.ModuleType("__main__")
    main.__file__ = script
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    with open(script, "rb") as file:
        source = file.read()
    try:
        exec(compile(source, script, "exec"), main.__dict__)
    except Exception as raised:
        error = raised.with_traceback(
            raised.__traceback__ and raised.__traceback__.tb_next
        )  # without this line
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def main() -> None:
    """Run the command line; go on after it in each process that was forked for a client."""
    server = Server(Path(sys.argv[1]))
    del sys.path[0]  # this file's
    server.open(sys.argv[2:])
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    request = server.serve()
    become(request)
    run(request["arguments"])


if __name__ == "__main__":
    main()
