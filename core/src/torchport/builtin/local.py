"""The launcher `local`: processes on this machine. Imports no torch, and nothing that it does not need."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from torchport import envvars
from torchport.builtin.processes import cannot_execute
from torchport.builtin.ranks import ELASTIC_RUN_ID, cores, free_port, rank_variables, read_topology
from torchport.plugin.launcher import Job, Launcher
from torchport.plugin.specs import Topology

_BOTH_STREAMS = 3


class LocalLauncher(Launcher):
    """Starts processes on this machine; a single one replaces the launching process."""

    def launch(self, job: Job) -> int:
        """Run `job`: one process by becoming it, several under a supervisor.

        Raises:
            LaunchError: if the program cannot be executed.
        """
        port = job.main_process_port or free_port()
        address = job.main_process_ip or "127.0.0.1"
        environs = []
        for rank in range(job.num_processes):
            place = Topology(
                rank=rank,
                world_size=job.num_processes,
                local_rank=rank,
                local_world_size=job.num_processes,
                master_addr=address,
                master_port=port,
            )
            environs.append({**job.environ, **rank_variables(place)})
        if job.num_processes == 1 and not job.log_dir and job.tee == _BOTH_STREAMS:
            replace_process(job.command, environs[0])
        from torchport.builtin.supervisor import Supervisor

        for environ in environs:
            environ.setdefault("PYTHONUNBUFFERED", "1")
            environ.setdefault(envvars.THREADS, str(max(1, cores() // job.num_processes)))
        return Supervisor(job, environs).run()

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the variables that this launcher sets, or that were set by hand in the same way."""
        return None if environ.get(ELASTIC_RUN_ID) else read_topology(environ, "local")


def replace_process(command: tuple[str, ...], environ: Mapping[str, str]) -> None:
    """Become `command`: same process id, terminal and exit code, nothing in between.

    Raises:
        LaunchError: if it cannot be executed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that would be inherited
    try:
        os.execvpe(command[0], command, dict(environ))
    except OSError as error:
        raise cannot_execute(command, error) from error
