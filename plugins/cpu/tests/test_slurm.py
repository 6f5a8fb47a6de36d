"""The SLURM launcher: its arguments, and places read from the variables that srun documents."""

from __future__ import annotations

import pytest
from torchport.errors import LaunchError
from torchport.plugin import Job, LauncherSpec, Topology
from torchport_cpu import slurm
from torchport_cpu.slurm import SlurmLauncher, build_arguments, expand_hosts, expand_tasks

SPEC = LauncherSpec(name="slurm", factory="torchport_cpu.slurm:SlurmLauncher")

# Task 6 of a step of 11 tasks on 3 nodes.
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "node[08-10]",
}
PLACE = {"rank": 6, "world_size": 11, "local_rank": 2, "local_world_size": 4, "node_rank": 1, "num_nodes": 3}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("node[1-2],gpu[098-101]", ["node1", "node2", "gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[1-2].hpc", ["r1n1.hpc", "r1n2.hpc", "r2n1.hpc", "r2n2.hpc"]),
        ("a-b[3]", ["a-b3"]),
        ("", []),
    ],
)
def test_host_lists_are_expanded(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["node[1-3", "node1-3]", "node[a-b]"])
def test_a_broken_host_list_is_an_error(text):
    with pytest.raises(ValueError, match="host list"):
        expand_hosts(text)


@pytest.mark.parametrize(
    ("text", "tasks"), [("4(x2),3", [4, 4, 3]), ("1", [1]), ("2(x3)", [2, 2, 2]), ("1,2,1(x2)", [1, 2, 1, 1])]
)
def test_tasks_per_node_are_expanded(text, tasks):
    assert expand_tasks(text) == tasks


def test_broken_tasks_per_node_are_an_error():
    with pytest.raises(ValueError, match="tasks per node"):
        expand_tasks("4*2")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (STEP, Topology(**PLACE, master_addr="node08", master_port=15000 + 123458 % 20000, source="SLURM")),
        (
            {**STEP, "MASTER_ADDR": "h", "MASTER_PORT": "9"},
            Topology(**PLACE, master_addr="h", master_port=9, source="SLURM"),
        ),
        # the batch script of an allocation: no step, or the number that stands for it
        ({k: v for k, v in STEP.items() if "STEP" not in k}, None),
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB)}, None),
        # the shell that salloc opens on a node
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}, None),
        # one task: nobody to meet
        (
            {
                **STEP,
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_TASKS_PER_NODE": "1",
            },
            Topology(source="SLURM"),
        ),
    ],
)
def test_the_place_is_read_from_a_steps_variables(environ, expected):
    assert SlurmLauncher(SPEC).detect(environ) == expected


def test_incomplete_variables_are_an_error_that_names_them():
    incomplete = {k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}
    with pytest.raises(ValueError, match="SLURM_LOCALID"):
        SlurmLauncher(SPEC).detect(incomplete)


def job(**settings) -> Job:
    return Job(**{"command": ("python", "t.py"), "environ": {}, "num_processes": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "--ntasks 4 --nodes 1 --kill-on-bad-exit=1 --ntasks-per-node 4 --label"),
        (
            {"num_machines": 2, "log_prefix": False, "extra_args": ("--cpus-per-task=8",)},
            "--ntasks 4 --nodes 2 --kill-on-bad-exit=1 --ntasks-per-node 2 --cpus-per-task=8",
        ),
        (
            {"num_machines": 3, "log_dir": "logs"},
            "--ntasks 4 --nodes 3 --kill-on-bad-exit=1 --output logs/rank%t.out --error logs/rank%t.err",
        ),
    ],
)
def test_arguments_of_srun(settings, expected):
    assert build_arguments(job(**settings)) == ["srun", *expected.split(), "python", "t.py"]


def test_outside_of_slurm_the_probe_says_why_and_launching_fails_with_that(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.probe().available
    assert "srun is not on PATH" in slurm.probe().reason
    with pytest.raises(LaunchError, match="srun is not on PATH"):
        SlurmLauncher(SPEC).launch(job())


def test_outside_of_an_allocation_the_probe_names_salloc(monkeypatch, tmp_path):
    program = tmp_path / "srun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "salloc" in slurm.probe().reason
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.probe().available
