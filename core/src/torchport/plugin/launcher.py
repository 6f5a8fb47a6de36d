"""The interface to a way to bring processes to life. Imports no torch: a launch must start at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchport.plugin.specs import LauncherSpec, Record, Topology


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Job(Record):
    """What to run, and how many times.

    Attributes:
        command: Argument vector of one worker process, the same for all.
        environ: The whole environment of a worker, less the variables that tell it its rank.
        num_processes: Number of processes over all machines.
        num_machines: Number of machines.
        machine_rank: Index of this machine.
        main_process_ip: Address of machine 0; empty on a single machine.
        main_process_port: TCP port there; 0 means any free one (single machine only).
        log_dir: Folder for one file per rank and stream; empty means none.
        tee: Which streams appear on the console: 0 none, 1 standard output, 2 standard error, 3 both.
        log_prefix: Whether each line on the console starts with the rank that wrote it.
        quiet: Whether the launcher adds nothing of its own to the failing rank's error.
        max_restarts: How often the whole group of workers is started again after a failure.
        monitor_interval: Seconds between two looks at the workers, for launchers that poll.
        rdzv_backend: Rendezvous method of the elastic agent (`"static"`, `"c10d"`, `"etcd"`).
        rdzv_conf: Further settings of the rendezvous, `"key=value,key=value"`.
        rdzv_id: Name of the job at the rendezvous.
        role: Name of the workers' role in logs.
        host_file: File that lists the machines, for launchers that reach them by themselves.
        extra_args: Further arguments for the launching program itself (`mpirun`, `srun`).
    """

    command: tuple[str, ...]
    environ: Mapping[str, str]
    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = ""
    main_process_port: int = 0
    log_dir: str = ""
    tee: int = 3
    log_prefix: bool = True
    quiet: bool = False
    max_restarts: int = 0
    monitor_interval: float = 0.1
    rdzv_backend: str = "static"
    rdzv_conf: str = ""
    rdzv_id: str = ""
    role: str = ""
    host_file: str = ""
    extra_args: tuple[str, ...] = ()

    @property
    def processes_per_machine(self) -> int:
        """Number of processes on this machine."""
        return self.num_processes // self.num_machines


class Launcher(ABC):
    """A way to bring processes to life.

    Args:
        spec: The descriptor that named this factory.
        config: An instance of the spec's `config` dataclass, or `None`.
    """

    def __init__(self, spec: LauncherSpec, config: Any = None) -> None:
        self.spec = spec
        self.config = config

    @abstractmethod
    def launch(self, job: Job) -> int:
        """Run `job` to its end and return its exit code, or replace this process by it and not return.

        Raises:
            LaunchError: if the processes cannot be started.
        """

    @abstractmethod
    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read this process's place in a job from the variables that this launcher sets; `None` if unset."""
