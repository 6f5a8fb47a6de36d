"""The launcher `xla`: one process for each device, on each machine of a pod. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping

from torchport import envvars
from torchport.builtin.local import LocalLauncher, replace_process
from torchport.builtin.ranks import rank_variables
from torchport.errors import LaunchError
from torchport.plugin import Job, Launcher, Topology, missing_runtime

from torchport_tpu import SPMD, TORCH_TPU

PORT = 29500
"""Where the machines of a pod meet unless told otherwise."""

_ENVIRONMENT = """
import os
from torch.tpu import distributed
distributed.set_tpu_launch_env(nproc_per_node={processes})
for name, value in os.environ.items():
    if name.startswith("TORCH_TPU_"):
        print(f"set {{name}}={{value}}")
"""


class XlaLauncher(Launcher):
    """Starts processes as the installed runtime wants them started; run it on every machine of a pod.

    | runtime and strategy | processes |
    | --- | --- |
    | torch_xla, `spmd` | the script itself, once on each machine |
    | torch_xla, else | `torch_xla.launch`: one for each device |
    | torch_tpu | one for each device, after `torch.tpu.distributed.set_tpu_launch_env` |
    """

    def launch(self, job: Job) -> int:
        """Run `job` to its end and return its exit code.

        Raises:
            LaunchError: if the job asks for what cannot be done.
        """
        if job.max_restarts:
            raise LaunchError("the launcher 'xla' does not restart workers", hint="--launcher torchrun")
        place = pod(os.environ | dict(job.environ)) or Topology(
            rank=job.machine_rank,
            world_size=job.num_machines,
            node_rank=job.machine_rank,
            num_nodes=job.num_machines,
            master_addr=job.main_process_ip or "127.0.0.1",
            master_port=job.main_process_port or PORT,
        )
        if job.environ.get(envvars.STRATEGY) == SPMD:
            replace_process(job.command, {**job.environ, **rank_variables(place)})
        if not missing_runtime(TORCH_TPU):
            return self._native(job, place)
        environ = {
            **job.environ,
            envvars.MASTER_ADDR: place.master_addr,
            envvars.MASTER_PORT: str(place.master_port),
        }
        spawn = (sys.executable, "-m", "torchport_tpu.spawn", str(job.num_processes), *job.command[1:])
        if job.command[0] != sys.executable:
            raise LaunchError(
                "the launcher 'xla' runs Python scripts", found=job.command[0], hint="leave out --no-python"
            )
        replace_process(spawn, environ)
        return 0

    def _native(self, job: Job, place: Topology) -> int:
        """Start processes with the variables that torch_tpu makes."""
        if place.num_nodes > 1:
            raise LaunchError(
                "the machines of a pod are connected by PyTorch's agent under torch_tpu",
                found=f"{place.num_nodes} machines",
                hint='on each: eval "$(python -m torch_tpu._internal.distributed.distributed)", which sets NODE_RANK'
                f" and MASTER_ADDR, and torchport launch --launcher torchrun --num-machines {place.num_nodes}"
                f" --num-processes {job.num_processes} --machine-rank $NODE_RANK --main-process-ip $MASTER_ADDR ...",
            )
        made = subprocess.run(
            [sys.executable, "-c", _ENVIRONMENT.format(processes=job.num_processes)],
            env=dict(job.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise LaunchError(
                "torch_tpu cannot prepare the processes of this machine",
                reason=made.stderr.strip().splitlines()[-1] if made.stderr.strip() else "no message",
            )
        lines = [line.removeprefix("set ") for line in made.stdout.splitlines() if line.startswith("set ")]
        environ = {**job.environ, **dict(line.split("=", 1) for line in lines)}
        return LocalLauncher(self.spec).launch(dataclasses.replace(job, environ=environ))

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the place of this machine in a pod from the variables of a TPU virtual machine."""
        return pod(environ)


def pod(environ: Mapping[str, str]) -> Topology | None:
    """Return the place of this machine among those of a pod; `None` on a single one.

    Raises:
        ValueError: if the variables contradict each other.
    """
    hosts = [name.strip() for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    if len(hosts) < 2:
        return None
    number = environ.get("TPU_WORKER_ID", "")
    if not number.isdigit() or int(number) >= len(hosts):
        raise ValueError(f"TPU_WORKER_HOSTNAMES has {len(hosts)} names, and TPU_WORKER_ID is {number!r}")
    return Topology(
        rank=int(number),
        world_size=len(hosts),
        node_rank=int(number),
        num_nodes=len(hosts),
        master_addr=environ.get(envvars.MASTER_ADDR) or hosts[0],
        master_port=int(environ.get(envvars.MASTER_PORT) or PORT),
        source="TPU_WORKER_HOSTNAMES",
    )
