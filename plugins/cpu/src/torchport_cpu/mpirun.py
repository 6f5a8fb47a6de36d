"""Processes started by the MPI library's own launcher: mpirun or mpiexec."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchport import envvars
from torchport.errors import LaunchError
from torchport.plugin import Job, Launcher, Probe, Topology

from torchport_cpu.cores import thread_limit
from torchport_cpu.mpi_probe import FLAVOURS, INSTALL, Library, find_library, flavour_of

_NAMES = ("mpiexec", "mpirun", "mpiexec.hydra", "ompirun_wrapper", "mpirun.openmpi", "mpirun.mpich")
"""Programs looked for. Where two MPI libraries share a folder, only the last four tell them apart.

`ompirun_wrapper` is what `mpirun` of the PyPI wheel of Open MPI runs.
"""

_FORWARDED = (
    "TORCHPORT_",
    "MASTER_",
    "OMP_",
    "MKL_",
    "KMP_",
    "MPI4PY_",
    "PYTHON",
    "LD_",
    "VIRTUAL_ENV",
    "PATH",
)
"""Beginnings of names of variables that the processes on other machines get in any case."""

_HOST_FLAGS = frozenset(
    {"-H", "-host", "--host", "-hosts", "-f", "-hostfile", "--hostfile", "-machinefile", "--machinefile"}
)
_RESOURCE_MANAGERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE")
_PLACEMENT = frozenset(
    {"--bind-to", "-bind-to", "--map-by", "-map-by", "--rank-by", "--cpu-set", "--rankfile"}
)


@dataclass(frozen=True, slots=True)
class Program:
    """An installed MPI launcher.

    Attributes:
        path: Its file.
        flavour: Which MPI it belongs to (`mpi_probe.FLAVOURS`).
        version: Its version number, as text.
        environ: What it needs in its environment to work from where it is installed.
    """

    path: str
    flavour: str
    version: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def major(self) -> int:
        """The first number of the version; 0 if there is none."""
        found = re.match(r"\d+", self.version)
        return int(found.group()) if found else 0

    def __str__(self) -> str:
        return f"{self.path} of {FLAVOURS[self.flavour]} {self.version}".strip()


class MpirunLauncher(Launcher):
    """Starts processes by `mpirun` or `mpiexec` of Open MPI, MPICH or Intel MPI.

    The launcher of the library that mpi4py loads is taken: processes started by another one would not find each
    other. This process is replaced by it, so that signals and the exit code are its own.
    """

    def launch(self, job: Job) -> int:
        """Replace this process by the MPI launcher.

        Raises:
            LaunchError: if there is no launcher that fits, or the job asks for what it cannot do.
        """
        check_job(job, os.environ)
        library = find_library(job.environ)
        program = choose_program(find_programs(folders(job.environ, library)), library)
        environ = worker_environ(job, program)
        arguments = build_arguments(job, program, forwarded(environ, os.environ), root=_is_root())
        try:
            os.execve(program.path, arguments, environ)
        except OSError as error:
            raise LaunchError(f"cannot start {program}", reason=str(error)) from error

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """Read the variables of Open MPI, or of MPICH and Intel MPI (PMI)."""
        return _detect_openmpi(environ) or _detect_pmi(environ)


def probe() -> Probe:
    """Say which launchers there are."""
    programs = find_programs(folders(os.environ, Library()))
    if not programs:
        return Probe(
            available=False,
            reason=f"neither mpirun nor mpiexec is on PATH or beside {sys.executable}: {INSTALL}",
        )
    return Probe(available=True, details={"programs": ", ".join(map(str, programs))})


# --- which program -------------------------------------------------------------------------------------------


def folders(environ: Mapping[str, str], library: Library) -> list[Path]:
    """Return where to look for launchers: beside the MPI library, beside the interpreter, on PATH."""
    beside = [Path(library.path).parent.parent / "bin"] if library.path else []
    on_path = [Path(folder) for folder in environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    return list(dict.fromkeys([*beside, Path(sys.executable).parent, *on_path]))


def find_programs(places: Iterable[Path]) -> list[Program]:
    """Ask every launcher in these folders for its version."""
    found = []
    seen: set[Path] = set()
    for folder in places:
        for name in _NAMES:
            path = shutil.which(name, path=str(folder))
            if path is None or Path(path).resolve() in seen:
                continue
            seen.add(Path(path).resolve())
            program = _identify(Path(path))
            if program is not None:
                found.append(program)
    return found


def _identify(path: Path) -> Program | None:
    environ = {"OPAL_PREFIX": str(path.parent.parent)} if path.name == "ompirun_wrapper" else {}
    try:
        answer = subprocess.run(
            [str(path), "--version"],
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return None
    return parse_version(str(path), answer.stdout + answer.stderr, environ)


def parse_version(path: str, text: str, environ: Mapping[str, str] | None = None) -> Program | None:
    """Return the launcher whose `--version` printed `text`; `None` if it is not an MPI launcher we know."""
    flavour = flavour_of(text)
    if not flavour:
        return None
    number = re.search(r"(?:Version:?|\(Open MPI\))\s*v?(\d[\w.]*)", text)
    return Program(path, flavour, number.group(1) if number else "", environ or {})


def choose_program(programs: list[Program], library: Library) -> Program:
    """Take the first launcher of the library's flavour; the first of all if mpi4py loads no library.

    Raises:
        LaunchError: if there is none.
    """
    fitting = [p for p in programs if library.reason or p.flavour == library.flavour]
    if fitting:
        return fitting[0]
    if not programs:
        raise LaunchError(
            "launcher 'mpirun' wants mpirun or mpiexec",
            found=f"none on PATH or beside {sys.executable}",
            hint=INSTALL,
        )
    raise LaunchError(
        f"launcher 'mpirun' wants the launcher of {FLAVOURS[library.flavour]}, the library that mpi4py loads",
        found=", ".join(map(str, programs)),
        reason="processes started by another MPI's launcher are each a job of one process",
        hint="install the launcher of that MPI, or set MPI4PY_LIBMPI to the library of the launcher you have",
    )


# --- its arguments -------------------------------------------------------------------------------------------


def check_job(job: Job, environ: Mapping[str, str]) -> None:
    """Refuse what an MPI launcher cannot do.

    Raises:
        LaunchError: naming the setting.
    """
    if job.machine_rank != 0:
        raise LaunchError(
            "launcher 'mpirun' reaches the other machines by itself",
            found=f"machine_rank={job.machine_rank}",
            hint="run it once, on machine 0",
        )
    if job.max_restarts:
        raise LaunchError(
            "launcher 'mpirun' cannot restart workers",
            found=f"max_restarts={job.max_restarts}",
            hint="--launcher torchrun",
        )
    if job.num_processes % job.num_machines:
        raise LaunchError(
            "launcher 'mpirun' wants as many processes on every machine",
            found=f"{job.num_processes} processes on {job.num_machines} machines",
        )
    hosts_known = (
        job.host_file
        or _HOST_FLAGS & {argument.partition("=")[0] for argument in job.extra_args}
        or any(name in environ for name in _RESOURCE_MANAGERS)
    )
    if job.num_machines > 1 and not hosts_known:
        raise LaunchError(
            f"launcher 'mpirun' wants the names of {job.num_machines} machines",
            found="no host file, and no resource manager's job",
            hint="give a host file that lists them, one a line",
        )


def build_arguments(
    job: Job, program: Program, forward: Iterable[str] = (), *, root: bool = False
) -> list[str]:
    """Return the whole command line.

    Args:
        job: What to run.
        program: The launcher.
        forward: Names of variables to pass to the processes.
        root: Whether root runs it, which Open MPI refuses unless told otherwise.
    """
    flags = _openmpi_flags if program.flavour == "openmpi" else _hydra_flags
    return [program.path, *flags(job, program, list(forward), root), *job.extra_args, *job.command]


def _openmpi_flags(job: Job, program: Program, forward: list[str], root: bool) -> list[str]:
    flags = ["-np", str(job.num_processes)]
    flags += ["--allow-run-as-root"] if root else []
    flags += ["--hostfile", job.host_file] if job.host_file else []
    if not _PLACEMENT & {argument.partition("=")[0] for argument in job.extra_args}:
        # Open MPI would bind each process to a single core; PyTorch uses several threads.
        flags += ["--bind-to", "none"]
        if job.num_machines > 1:
            flags += ["--map-by", f"ppr:{job.processes_per_machine}:node"]
        elif not job.host_file:
            flags += ["--oversubscribe"]
    if job.log_prefix and job.num_processes > 1:
        flags += ["--output", "tag"] if program.major >= 5 else ["--tag-output"]
    if job.log_dir:
        flags += (
            ["--output", f"dir={job.log_dir}"] if program.major >= 5 else ["--output-filename", job.log_dir]
        )
    for name in forward:
        flags += ["-x", name]
    return flags


def _hydra_flags(job: Job, program: Program, forward: list[str], root: bool) -> list[str]:
    flags = ["-n", str(job.num_processes)]
    if job.num_machines > 1:
        flags += ["-ppn", str(job.processes_per_machine)]
    flags += ["-f", job.host_file] if job.host_file else []
    if job.log_prefix and job.num_processes > 1:
        flags += ["-prepend-rank"]
    if job.log_dir:
        flags += [
            "-outfile-pattern",
            f"{job.log_dir}/rank%r.out",
            "-errfile-pattern",
            f"{job.log_dir}/rank%r.err",
        ]
    if forward:
        flags += ["-genvlist", ",".join(forward)]
    return flags


def worker_environ(job: Job, program: Program) -> dict[str, str]:
    """Return the environment of the launcher and its processes: where rank 0 listens, and how many threads."""
    environ = {**job.environ, **program.environ}
    address = job.main_process_ip or environ.get(envvars.MASTER_ADDR, "")
    if not address and job.num_machines == 1 and not job.host_file:
        address = "127.0.0.1"
    if address:
        port = job.main_process_port or int(environ.get(envvars.MASTER_PORT, 0))
        environ[envvars.MASTER_ADDR] = address
        environ[envvars.MASTER_PORT] = str(port or (_free_port() if job.num_machines == 1 else 29500))
    return environ | thread_limit(job.processes_per_machine, environ)


def forwarded(environ: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Name the variables to pass on: those that `environ` has and `own` has not, and those known to matter."""
    return sorted(
        name
        for name, value in environ.items()
        if (own.get(name) != value or name.startswith(_FORWARDED)) and "," not in name and "=" not in name
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


# --- inside a job --------------------------------------------------------------------------------------------


def _detect_openmpi(environ: Mapping[str, str]) -> Topology | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    return _topology(
        environ,
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    )


def _detect_pmi(environ: Mapping[str, str]) -> Topology | None:
    if "PMI_RANK" not in environ or ("MPI_LOCALRANKID" not in environ and "SLURM_STEP_ID" in environ):
        return None  # SLURM's PMI tells less than SLURM's own variables
    intel = any(name.startswith("I_MPI_HYDRA") or name == "I_MPI_MPIRUN" for name in environ)
    label = "Intel MPI" if intel else "MPICH"
    return _topology(environ, label, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _topology(
    environ: Mapping[str, str], label: str, rank: str, size: str, local_rank: str, local_size: str
) -> Topology:
    """Build a topology. MPI tells no index of the machine: machines are taken to be filled one after the other."""
    absent = [name for name in (rank, size, local_rank, local_size) if not environ.get(name, "").isdigit()]
    if absent:
        raise ValueError(f"{label} has set {rank}, but not {', '.join(absent)}")
    world, local = int(environ[size]), int(environ[local_size])
    return Topology(
        rank=int(environ[rank]),
        world_size=world,
        local_rank=int(environ[local_rank]),
        local_world_size=local,
        node_rank=int(environ[rank]) // local if local else 0,
        num_nodes=-(-world // local) if local else 1,
        master_addr=environ.get(envvars.MASTER_ADDR, ""),
        master_port=int(environ.get(envvars.MASTER_PORT) or 0),
        source=label,
    )
