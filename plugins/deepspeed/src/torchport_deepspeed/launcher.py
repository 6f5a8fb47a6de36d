"""The launcher `deepspeed`: DeepSpeed's own, which reaches the machines of a hostfile by pdsh and others."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torchport import envvars
from torchport.builtin.ranks import cores, free_port, read_topology
from torchport.errors import LaunchError
from torchport.plugin import Job, Launcher, Topology

from torchport_deepspeed.config import DeepSpeedPlugin

DEFAULT_PORT = 29500
"""Where machines meet unless told otherwise."""

_FORWARDED = ("TORCHPORT_", "ACCELERATE_", "OMP_", "MKL_", "DS_", "GLOO_", "NCCL_", "HF_", "CUDA_", "CCL_")
"""Beginnings of names of variables that the processes on other machines get."""

_NO_SSH = "nossh"


class DeepSpeedLauncher(Launcher):
    """Runs `deepspeed`, which starts the processes of every machine.

    It is called once, on one machine, except with the multi-node launcher `nossh`.
    """

    config: DeepSpeedPlugin

    def launch(self, job: Job) -> int:
        """Run DeepSpeed's launcher to its end, and return its exit code.

        Raises:
            LaunchError: if the job asks for what it cannot do.
        """
        command = self.command(job)
        with _environment_file(job.environ) as file:
            environ = {**self.environ(job), "DS_ENV_FILE": str(file)}
            try:
                process = subprocess.Popen(command, env=environ)
            except OSError as error:
                raise LaunchError(
                    "DeepSpeed's launcher cannot be started", reason=error.strerror or str(error)
                ) from error
            return _wait(process)

    def command(self, job: Job) -> tuple[str, ...]:
        """Return the command line of DeepSpeed's launcher for `job`.

        Raises:
            LaunchError: if the job asks for what it cannot do.
        """
        hostfile = self.check(job)
        config = self.config
        options = ["--log_level", "info" if _debug(job.environ) else "error"]
        if hostfile:
            options += ["--hostfile", hostfile]
        if config.inclusion_filter:
            options += ["--include", config.inclusion_filter]
        elif config.exclusion_filter:
            options += ["--exclude", config.exclusion_filter]
        else:
            if hostfile and job.num_machines > 1:
                options += ["--num_nodes", str(job.num_machines)]
            options += ["--num_accelerators", str(job.processes_per_machine)]
        if hostfile:
            launcher = config.multinode_launcher or "pdsh"
            if launcher == _NO_SSH:
                options += ["--no_ssh", "--node_rank", str(job.machine_rank)]
            else:
                options += ["--launcher", launcher, "--force_multi"]
            if job.main_process_ip:
                options += ["--master_addr", job.main_process_ip]
        port = job.main_process_port or (DEFAULT_PORT if hostfile else free_port())
        options += ["--master_port", str(port)]
        if job.log_dir:
            options += ["--enable_each_rank_log", job.log_dir]
        runner = (sys.executable, "-m", "deepspeed.launcher.runner")
        return (*runner, *options, *job.extra_args, "--no_local_rank", "--no_python", *job.command)

    def check(self, job: Job) -> str:
        """Return the hostfile, or nothing on a single machine.

        Raises:
            LaunchError: if the job asks for what this launcher cannot do.
        """
        config = self.config
        hostfile = config.hostfile or job.host_file
        if config.multinode_launcher == "standard":
            raise LaunchError(
                "deepspeed_multinode_launcher: standard is not one of DeepSpeed's launchers",
                hint="--launcher torchrun, on each machine",
            )
        if config.inclusion_filter and config.exclusion_filter:
            raise LaunchError(
                "the launcher 'deepspeed' was given both an inclusion and an exclusion filter",
                hint="one of them",
            )
        if job.num_machines > 1 and not hostfile:
            raise LaunchError(
                f"the launcher 'deepspeed' wants the names of {job.num_machines} machines",
                found="no hostfile",
                hint="--deepspeed-hostfile FILE, with lines such as: host1 slots=4",
            )
        if hostfile and not Path(hostfile).is_file():
            raise LaunchError(f"the hostfile {hostfile!r} does not exist")
        if job.max_restarts:
            raise LaunchError("the launcher 'deepspeed' does not restart workers", hint="--launcher torchrun")
        if job.machine_rank and config.multinode_launcher != _NO_SSH:
            raise LaunchError(
                "the launcher 'deepspeed' reaches the other machines by itself",
                found=f"machine_rank={job.machine_rank}",
                hint="run it once, on machine 0; or deepspeed_multinode_launcher: nossh",
            )
        return hostfile or ""

    def environ(self, job: Job) -> dict[str, str]:
        """Return the environment of DeepSpeed's launcher, which its processes on this machine inherit."""
        environ = dict(job.environ)
        environ.setdefault(envvars.THREADS, str(max(1, cores() // max(1, job.processes_per_machine))))
        if environ.get(envvars.BACKEND):
            environ.setdefault("DS_ACCELERATOR", environ[envvars.BACKEND])
        return environ

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the variables that DeepSpeed's launcher sets in its workers."""
        if not all(environ.get(name) for name in ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "RANK")):
            return None
        return read_topology(
            {
                **environ,
                envvars.LOCAL_WORLD_SIZE: environ["LOCAL_SIZE"],
                envvars.NODE_RANK: environ["CROSS_RANK"],
            },
            "deepspeed",
        )


def _debug(environ: Mapping[str, str]) -> bool:
    return envvars.flag(environ, envvars.DEBUG)


@contextmanager
def _environment_file(environ: Mapping[str, str]) -> Iterator[Path]:
    """Write the variables for other machines where DeepSpeed's launcher looks for them."""
    own = Path.home() / ".deepspeed_env"
    lines = own.read_text().splitlines() if own.is_file() else []
    lines += [f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith(_FORWARDED)]
    with tempfile.TemporaryDirectory(prefix="torchport-launch-") as folder:
        file = Path(folder) / "environment"
        file.write_text("".join(f"{line}\n" for line in lines if "=" in line))
        yield file


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process, handing on the signals that ask for it."""
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
