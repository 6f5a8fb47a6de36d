"""The launcher deepspeed; `pdsh` and `ssh` stand-ins run on this machine what they would run on others."""

import os
import stat
import sys

import pytest
from torchport.errors import LaunchError
from torchport.plugin import Job, LauncherSpec
from torchport_deepspeed import DeepSpeedPlugin
from torchport_deepspeed.launcher import DeepSpeedLauncher

SSH = """#!/bin/sh
echo 127.0.0.1
"""
PDSH = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
hosts = arguments[arguments.index("-w") + 1].split(",")
command = " ".join(arguments[arguments.index("-w") + 2 :])
started = [subprocess.Popen(["sh", "-c", command.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(process.wait() for process in started))
"""


def launcher(**settings):
    spec = LauncherSpec(name="deepspeed", factory="torchport_deepspeed.launcher:DeepSpeedLauncher")
    return DeepSpeedLauncher(spec, DeepSpeedPlugin(**settings))


def job(**settings):
    return Job(command=("python", "train.py", "--lr", "1"), environ={}, main_process_port=29501, **settings)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("one slots=1\ntwo slots=1\n")
    return str(path)


def options(command):
    assert command[:3] == (sys.executable, "-m", "deepspeed.launcher.runner")
    assert command[-6:] == ("--no_local_rank", "--no_python", "python", "train.py", "--lr", "1")
    return command[3:-6]


def test_one_machine_needs_no_hostfile():
    made = options(launcher().command(job(num_processes=2)))
    assert made == ("--log_level", "error", "--num_accelerators", "2", "--master_port", "29501")


def test_machines_of_a_hostfile_are_reached_by_pdsh(hostfile):
    made = options(launcher(hostfile=hostfile).command(job(num_processes=4, num_machines=2)))
    assert made[2:] == (
        *("--hostfile", hostfile, "--num_nodes", "2", "--num_accelerators", "2"),
        *("--launcher", "pdsh", "--force_multi", "--master_port", "29501"),
    )


def test_filters_take_the_place_of_numbers(hostfile):
    made = options(
        launcher(hostfile=hostfile, exclusion_filter="two:0", multinode_launcher="openmpi").command(
            job(num_processes=2, num_machines=2, main_process_ip="10.0.0.1")
        )
    )
    assert made[4:] == (
        *("--exclude", "two:0", "--launcher", "openmpi", "--force_multi"),
        *("--master_addr", "10.0.0.1", "--master_port", "29501"),
    )


def test_nossh_is_run_on_every_machine(hostfile):
    made = launcher(multinode_launcher="nossh").command(
        job(num_processes=2, num_machines=2, machine_rank=1, host_file=hostfile, main_process_ip="10.0.0.1")
    )
    assert "--no_ssh --node_rank 1 --master_addr 10.0.0.1" in " ".join(made)


@pytest.mark.parametrize(
    ("settings", "asked", "problem"),
    [
        ({}, {"num_processes": 2, "num_machines": 2}, "wants the names of 2 machines"),
        ({"hostfile": "absent"}, {}, "the hostfile 'absent' does not exist"),
        ({"multinode_launcher": "standard"}, {}, "is not one of DeepSpeed's launchers"),
        ({"inclusion_filter": "a", "exclusion_filter": "b"}, {}, "both an inclusion and an exclusion filter"),
        ({}, {"max_restarts": 1}, "does not restart workers"),
        ({}, {"num_processes": 2, "machine_rank": 1}, "reaches the other machines by itself"),
    ],
)
def test_what_the_launcher_cannot_do_is_refused(settings, asked, problem):
    with pytest.raises(LaunchError, match=problem):
        launcher(**settings).command(job(**asked))


@pytest.mark.multiprocess
def test_a_hostfile_chooses_the_launcher_and_every_machine_runs_its_processes(
    run_job, tmp_path, hostfile, monkeypatch
):
    for name, content in (("ssh", SSH), ("pdsh", PDSH.format(python=sys.executable))):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    file = tmp_path / "config.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_machines: 2\ndeepspeed_config:\n"
        f"  deepspeed_hostfile: {hostfile}\n  zero_stage: 1\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    _, ranks = run_job("place.py", "an_argument", options=("--config-file", str(file)))
    for number, rank in enumerate(ranks):
        assert rank == {
            "rank": number,
            "world_size": 2,
            "node_rank": number,
            "local_rank": 0,
            "source": "deepspeed",
            "sum": 3,
            "strategy": "deepspeed",
            "stage": "1",
            "arguments": ["an_argument"],
        }
    assert len(ranks) == 2
