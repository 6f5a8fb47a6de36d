"""Stand for the interpreter: have a script run by `prefork_server.py`, and be to others what its process is.

Signals go on to that process; this one ends as it ends. If this one is killed, so is the other. What only a new
interpreter can do (`-c`, options, variables that are read when PyTorch is loaded) is done by one.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

SETTINGS = "settings.json"  # in the folder of this program: what preforking.py knows
SERVERS = ("even", "odd")  # by rank
AT_START = (
    "PYTHON", "TORCH_", "TORCHDYNAMO", "TORCHINDUCTOR", "PYTORCH_", "LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_",
)  # fmt: skip
AT_ANY_TIME = {
    "PYTHONPATH", "PYTHONWARNINGS", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHON_EXEC",
    "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "LD_LIBRARY_PATH",
    # Libraries set these when they are imported: DeepSpeed, torchao and Lightning Fabric, scikit-learn.
    "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
}  # fmt: skip
"""What the server does for a process that it has forked, what is read later, and what only Intel's OpenMP reads."""

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
)  # fmt: skip


def fixed_at_start(environ):
    """The variables that are read once, when an interpreter starts or PyTorch is loaded."""
    return {name: environ[name] for name in environ if name.startswith(AT_START) and name not in AT_ANY_TIME}


def open_files():
    """Return the numbers of the files that this process was given."""
    with os.scandir("/proc/self/fd") as listing:
        numbers = sorted(int(entry.name) for entry in listing)
    found = []
    for number in numbers:
        with contextlib.suppress(OSError):  # that of the listing itself
            os.fstat(number)
            found.append(number)
    return found


def forkable(arguments, fixed):
    """Whether these arguments need no interpreter of their own, and neither do the variables."""
    program = next((argument for argument in arguments if argument != "-u"), "-")
    return (program == "-m" or not program.startswith("-")) and fixed_at_start(os.environ) == fixed


class Process:
    """A process of the server, as this process is to show it."""

    def __init__(self, server, arguments):
        self.pid = 0
        self.early = []  # signals that came before it was there
        self.ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
        for number in FORWARDED:
            if number not in self.ignored:
                signal.signal(number, self.forward)
        environ, cwd = dict(os.environ), os.getcwd()
        files = open_files()
        request = {
            "arguments": arguments,
            "cwd": cwd,
            "environ": environ,
            "ignored": self.ignored,
            "files": files,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(server)
        data = json.dumps(request).encode() + b"\n"
        connection.sendall(data[socket.send_fds(connection, [data], files) :])
        for file in files:  # whoever reads them waits for that process, not for this one
            os.close(file)
        self.answers = connection.makefile("r")
        self.pid = int(self.answers.readline())
        for number in self.early:
            self.forward(number)

    def forward(self, number, frame=None):
        """Send a signal on."""
        if not self.pid:
            self.early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end_alike(self):
        """Wait for its end and end in the same way."""
        status = int(self.answers.readline() or "1")
        if status < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if -status != signal.SIGKILL:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


def main():
    """Run the command line."""
    with open(os.path.join(os.path.dirname(__file__), SETTINGS)) as file:
        settings = json.load(file)
    arguments = sys.argv[1:]
    if not forkable(arguments, settings["fixed"]):
        os.execv(settings["python"], [settings["python"], *arguments])
    rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    Process(os.path.join(settings["folder"], SERVERS[rank % 2]), arguments).end_alike()


if __name__ == "__main__":
    main()
