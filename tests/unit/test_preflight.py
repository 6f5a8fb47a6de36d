"""What `torchport launch` says and refuses before it starts a process."""

from __future__ import annotations

import pytest
from torchport.cli import preflight
from torchport.config.layers import Layer, resolve
from torchport.errors import ConfigurationError, LaunchError
from torchport.plan.registry import Entry, Installed, Plugin
from torchport.plan.topology import detect_topology
from torchport.plugin import LauncherSpec

SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def configured(environ: dict[str, str] | None = None, **values: str):
    flags = Layer()
    for name, value in values.items():
        flags.put(name, value, f"--{name.replace('_', '-')}")
    return resolve(flags, environ or {})


def test_one_process_that_would_train_alone_beside_others_is_refused_with_the_flags_to_type():
    with pytest.raises(LaunchError) as caught:
        preflight.check_outer_ranks(SECOND_OF_TWO, 1)
    error = caught.value
    assert error.problem == "WORLD_SIZE=2 is set, and this launch is of one process"
    assert error.found == "RANK=1, WORLD_SIZE=2, MASTER_ADDR=10.0.0.1, MASTER_PORT=29500"
    assert error.hint == (
        "unset WORLD_SIZE; or, for one process on each of 2 machines:"
        " --num-processes 2 --num-machines 2 --machine-rank 1 --main-process-ip 10.0.0.1"
    )


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        (SECOND_OF_TWO, 2),  # a scheduler's variables, and the launcher starts the processes of this machine
        ({**SECOND_OF_TWO, "LOCAL_RANK": "0"}, 1),  # a job of its own inside the process of another launcher
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        ({}, 1),
    ],
)
def test_a_launch_inside_another_job_is_left_alone_where_it_can_be_meant(environ, processes):
    preflight.check_outer_ranks(environ, processes)


def test_variables_without_a_local_rank_are_refused_with_those_that_would_complete_them():
    spec = LauncherSpec(name="local", factory="torchport.builtin.local:LocalLauncher", priority=100)
    installed = Installed()
    installed.add([Entry(spec, Plugin("core", "torchport-core", "0.1.0"))])
    with pytest.raises(LaunchError) as caught:
        detect_topology(SECOND_OF_TWO, installed)
    assert caught.value.hint == (
        "unset them, start the script with `torchport launch`, or set LOCAL_RANK and LOCAL_WORLD_SIZE too"
    )
    complete = {**SECOND_OF_TWO, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect_topology(complete, installed).rank == 1


@pytest.mark.parametrize(
    ("values", "environ", "expected"),
    [
        ({"gradient_accumulation_steps": "0"}, {}, "--gradient-accumulation-steps must be at least 1\n  found:  0"),
        ({}, {"TORCHPORT_GRADIENT_ACCUMULATION_STEPS": "-2"}, "TORCHPORT_GRADIENT_ACCUMULATION_STEPS must be"),
        ({}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be"),
        ({"config_file": "c.yaml"}, {}, "c.yaml: gradient_accumulation_steps must be at least 1"),
        ({}, {"TORCHPORT_TIMEOUT": "abc"}, "TORCHPORT_TIMEOUT must be a time"),
    ],
)  # fmt: skip
def test_a_value_that_every_process_would_refuse_is_refused_with_who_gave_it(
    tmp_path, monkeypatch, values, environ, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("gradient_accumulation_steps: 0")
    with pytest.raises(ConfigurationError) as caught:
        preflight.check_values(configured(environ, **values))
    assert expected in str(caught.value)


def test_good_values_pass():
    preflight.check_values(configured({"TORCHPORT_TIMEOUT": "90"}, gradient_accumulation_steps="4"))


@pytest.mark.parametrize(
    ("arguments", "flag", "now"),
    [
        (("--num-processes", "2"), "--num-processes", "num_processes=1"),
        (("--lr", "1", "--num_processes=2"), "--num_processes", "num_processes=1"),
        (("-n", "2"), "-n", "num_processes=1"),
        (("--num-machines", "2"), "--num-machines", "num_machines=1"),
    ],
)
def test_a_number_of_processes_after_the_script_is_mentioned(arguments, flag, now):
    assert preflight.misplaced_flags(configured(), 1, "train.py", arguments) == (
        f"{flag} after train.py goes to the script; the launch is of {now}:"
        " the launcher's own flags come before the script",
    )


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"num_processes": "1"}, ("--num-processes", "2")),  # the launcher has got its own
        ({"no_python": "true"}, ("-n", "2")),  # such as `head -n 2`
        ({}, ()),
        ({}, ("-n", "name", "--num-epochs", "2", "-n")),
    ],
)
def test_other_arguments_of_the_script_are_not_mentioned(values, arguments):
    assert preflight.misplaced_flags(configured(**values), 1, "train.py", arguments) == ()
