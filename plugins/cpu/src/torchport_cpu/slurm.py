"""Processes started by SLURM's srun inside an allocation."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping

from torchport import envvars
from torchport.errors import LaunchError
from torchport.plugin import Job, Launcher, Probe, Topology

from torchport_cpu.cores import thread_limit

_PSEUDO_STEPS = 0xFFFFFFF0
"""Step numbers from here on are not steps of `srun`: the batch script, the interactive and the external step."""


class SlurmLauncher(Launcher):
    """Starts processes by `srun`, as one step of the allocation that this process is in."""

    def launch(self, job: Job) -> int:
        """Replace this process by `srun`.

        Raises:
            LaunchError: if there is no allocation, or the job asks for what `srun` cannot do.
        """
        found = probe()
        if not found.available:
            raise LaunchError("launcher 'slurm' wants srun inside an allocation", reason=found.reason)
        if job.max_restarts:
            raise LaunchError(
                "launcher 'slurm' cannot restart workers",
                found=f"max_restarts={job.max_restarts}",
                hint="--launcher torchrun inside the allocation, or sbatch --requeue",
            )
        environ = {**job.environ, **thread_limit(job.processes_per_machine, job.environ)}
        if job.main_process_ip:
            environ[envvars.MASTER_ADDR] = job.main_process_ip
        if job.main_process_port:
            environ[envvars.MASTER_PORT] = str(job.main_process_port)
        arguments = build_arguments(job)
        try:
            os.execvpe(arguments[0], arguments, environ)
        except OSError as error:
            raise LaunchError("cannot start srun", reason=str(error)) from error

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the variables of a step of `srun`; the batch script of an allocation is not one."""
        step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
        if not step.isdigit() or int(step) >= _PSEUDO_STEPS or "SLURM_PROCID" not in environ:
            return None
        needed = ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
        absent = [name for name in needed if not environ.get(name)]
        if absent:
            raise ValueError(f"SLURM has set SLURM_PROCID, but not {', '.join(absent)}")
        world, node = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_NODEID"])
        tasks = expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
        if node >= len(tasks):
            raise ValueError(
                f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE lists {len(tasks)} nodes"
            )
        address, port = _meeting_place(environ, int(step)) if world > 1 else ("", 0)
        return Topology(
            rank=int(environ["SLURM_PROCID"]),
            world_size=world,
            local_rank=int(environ["SLURM_LOCALID"]),
            local_world_size=tasks[node],
            node_rank=node,
            num_nodes=len(tasks),
            master_addr=environ.get(envvars.MASTER_ADDR, "") or address,
            master_port=int(environ.get(envvars.MASTER_PORT) or 0) or port,
            source="SLURM",
        )


def probe() -> Probe:
    """Say whether `srun` can be used here."""
    if shutil.which("srun") is None:
        return Probe(available=False, reason="srun is not on PATH: this is not a machine of a SLURM cluster")
    if not os.environ.get("SLURM_JOB_ID"):
        return Probe(
            available=False,
            reason="SLURM_JOB_ID is not set: run inside an allocation (salloc, or a script for sbatch)",
        )
    return Probe(available=True, details={"job": os.environ["SLURM_JOB_ID"]})


def build_arguments(job: Job) -> list[str]:
    """Return the command line of `srun`."""
    flags = ["--ntasks", str(job.num_processes), "--nodes", str(job.num_machines)]
    flags += ["--kill-on-bad-exit=1"]
    if job.num_processes % job.num_machines == 0:
        flags += ["--ntasks-per-node", str(job.processes_per_machine)]
    flags += ["--label"] if job.log_prefix and job.num_processes > 1 and not job.log_dir else []
    if job.log_dir:
        flags += ["--output", f"{job.log_dir}/rank%t.out", "--error", f"{job.log_dir}/rank%t.err"]
    flags += ["--nodefile", job.host_file] if job.host_file else []
    return ["srun", *flags, *job.extra_args, *job.command]


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of a SLURM host list: `"a[01-03,7],b"` is a01, a02, a03, a7, b.

    Raises:
        ValueError: if the brackets do not match.
    """
    hosts: list[str] = []
    for item in _split(text):
        opened = item.find("[")
        if opened < 0:
            if "]" in item:
                raise ValueError(f"{text!r} is not a SLURM host list")
            hosts.append(item)
            continue
        closed = item.find("]", opened)
        if closed < 0:
            raise ValueError(f"{text!r} is not a SLURM host list")
        rest = expand_hosts(item[closed + 1 :]) or [""]
        for number in _numbers(item[opened + 1 : closed]):
            hosts += [f"{item[:opened]}{number}{tail}" for tail in rest]
    return hosts


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _numbers(text: str) -> list[str]:
    """Return the numbers of `"01-03,7"`, with the width of each range's beginning."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"{part!r} is not a range of a SLURM host list")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_tasks(text: str) -> list[int]:
    """Return the number of tasks on each node: `"4(x2),3"` is 4, 4, 3.

    Raises:
        ValueError: if the text is not of that form.
    """
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ValueError(f"{text!r} is not a SLURM list of tasks per node")
        tasks += [int(found.group(1))] * int(found.group(2) or 1)
    return tasks


def _meeting_place(environ: Mapping[str, str], step: int) -> tuple[str, int]:
    """Return the first host of the step, and a port that steps running side by side do not share."""
    hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "")))
    job = environ.get("SLURM_JOB_ID", "0")
    return (hosts[0] if hosts else ""), 15000 + (int(job) + step) % 20000 if job.isdigit() else 15000
