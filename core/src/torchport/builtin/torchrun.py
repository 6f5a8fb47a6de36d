"""The launcher `torchrun`: PyTorch's elastic agent, for several machines, restarts and rendezvous."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torchport import envvars
from torchport.builtin.interfaces import interface_towards
from torchport.builtin.local import replace_process
from torchport.builtin.ranks import ELASTIC_RUN_ID, cores, free_port, read_topology
from torchport.errors import LaunchError
from torchport.plugin.launcher import Job, Launcher
from torchport.plugin.specs import Topology

DEFAULT_PORT = 29500
"""Where machines meet unless told otherwise; the same on all of them."""

_STATIC = "static"


class TorchrunLauncher(Launcher):
    """Hands the job over to `torch.distributed.run`, which replaces the launching process."""

    def launch(self, job: Job) -> int:
        """Become torchrun's elastic agent.

        Raises:
            LaunchError: if several machines are asked for without a place to meet.
        """
        if job.num_machines > 1 and not job.main_process_ip:
            raise LaunchError(
                f"a job on {job.num_machines} machines needs the address of machine 0",
                hint="--main-process-ip ADDRESS, the same on all machines",
            )
        replace_process(self.command(job), self.environ(job))
        raise AssertionError("not reached: this process has been replaced")

    def command(self, job: Job) -> tuple[str, ...]:
        """Return the command line of the agent for `job`."""
        alone = job.num_machines == 1
        address = job.main_process_ip or "127.0.0.1"
        port = job.main_process_port or (free_port() if alone else DEFAULT_PORT)
        options = {
            "nnodes": job.num_machines,
            "nproc-per-node": job.processes_per_machine,
            "max-restarts": job.max_restarts,
            "monitor-interval": job.monitor_interval,
            "role": job.role,
            "rdzv-id": job.rdzv_id,
            "rdzv-conf": job.rdzv_conf,
        }
        if job.rdzv_backend in ("", _STATIC):
            options |= {"node-rank": job.machine_rank, "master-addr": address, "master-port": port}
        else:
            options |= {"rdzv-backend": job.rdzv_backend, "rdzv-endpoint": f"{address}:{port}"}
        if job.log_dir:
            options |= {"log-dir": job.log_dir, "redirects": 3, "tee": job.tee}
        flags = [part for name, value in options.items() if value != "" for part in (f"--{name}", str(value))]
        return (
            sys.executable,
            "-m",
            "torch.distributed.run",
            *flags,
            *job.extra_args,
            "--no-python",
            *job.command,
        )

    def environ(self, job: Job) -> dict[str, str]:
        """Return the environment of the agent, which its workers inherit."""
        environ = dict(job.environ)
        environ.setdefault(envvars.THREADS, str(max(1, cores() // job.processes_per_machine)))
        # Workers that ignore SIGTERM are killed after this many seconds (the agent's own default: 30).
        environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
        if job.log_prefix:
            environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")
        if job.num_machines > 1:
            name = interface_towards(job.main_process_ip, job.main_process_port or DEFAULT_PORT)
            if name:
                environ.setdefault("GLOO_SOCKET_IFNAME", name)
        return environ

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the variables that the agent sets in its workers."""
        return read_topology(environ, "torchrun") if environ.get(ELASTIC_RUN_ID) else None
