"""`torchport plugins`, `plan` and `doctor`, as an operator runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from torchport.cli import cli

LONG = "the driver was built for another kernel, " * 12 + "so reboot"
CHIP = f"""
    from torchport.plugin import BackendSpec, Probe, hookimpl

    @hookimpl
    def torchport_backends():
        yield BackendSpec(
            name="chip", device_type="chip", summary="a [bold] chip",
            factory="torchport_chip:Backend", probe="torchport_chip:probe",
        )

    def probe():
        return Probe(available=False, reason={LONG!r})
"""
BROKEN = "import a_vendor_that_is_not_there"


def torchport(*arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHPORT_")}
    command = [sys.executable, "-m", "torchport", *arguments]
    done = subprocess.run(
        command, env=environ | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# --- plugins ---------------------------------------------------------------------------------------------------


def test_plugins_shows_each_with_its_distribution_and_whether_it_is_available(site):
    site.install("torchport-chip", CHIP, version="1.2.3")
    lines = [line.split() for line in torchport("plugins").stdout.splitlines()]
    assert ["backend", "cpu", "torchport-cpu", "0.1.0", "the", "host's", "own", "processor", "yes"] in lines
    assert [
        "backend",
        "chip",
        "torchport-chip",
        "1.2.3",
        "a",
        "[bold]",
        "chip",
        "no:",
        *LONG.split(),
    ] in lines


def test_piped_output_holds_every_reason_whole_on_one_line(site):
    site.install("torchport-chip", CHIP)
    for command in ("plugins", "plan", "doctor"):
        assert any(LONG in line for line in torchport(command).stdout.splitlines()), command


def test_plugins_lists_failures_and_what_is_switched_off_below(site):
    site.install("torchport-chip", CHIP)
    site.install("torchport-nova", BROKEN)
    told = torchport("plugins", TORCHPORT_DISABLE_PLUGINS="chip").stdout
    assert "Could not be registered" in told
    assert "No module named 'a_vendor_that_is_not_there'" in told
    assert "it is listed in TORCHPORT_DISABLE_PLUGINS" in told
    assert LONG not in told


def test_plugins_as_json_can_be_narrowed_to_a_kind(site):
    site.install("torchport-chip", CHIP)
    told = json.loads(
        torchport("plugins", "--json", "--kind", "backend", TORCHPORT_PLUGINS="chip,cpu").stdout
    )
    assert [(item["name"], item["available"]) for item in told["plugins"]] == [("chip", False), ("cpu", True)]
    assert told["plugins"][0]["reason"] == LONG
    assert told["failures"] == []


# --- plan ------------------------------------------------------------------------------------------------------


def test_plan_says_what_would_be_chosen_and_what_not_and_why(site):
    site.install("torchport-chip", CHIP)
    told = json.loads(torchport("plan", "--json").stdout)
    backend = told["slots"]["backend"]
    backend["rejected"] = [rejected for rejected in backend["rejected"] if rejected["name"] == "chip"]
    assert backend == {
        "choice": ["cpu"],
        "source": "automatic: the highest priority that is available",
        "settings": None,
        "rejected": [{"name": "chip", "reason": LONG}],
    }
    assert told["topology"]["source"] == "no launcher"


def test_plan_reads_the_place_of_this_process_from_the_launchers_variables():
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    told = json.loads(torchport("plan", "--json", **place, MASTER_ADDR="host", MASTER_PORT="29500").stdout)
    assert told["topology"]["rank"] == 1
    assert told["topology"]["master_addr"] == "host"
    assert told["slots"]["strategy"]["choice"] == ["ddp"]


def test_plan_follows_flags_before_variables_before_the_file(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("precision: bf16\ntrackers: [jsonl]\nlauncher: torchrun\nnum_processes: 2\n")
    told = json.loads(
        torchport(
            "plan", "--json", "--config-file", str(file), "--precision", "no", TORCHPORT_LAUNCHER="local"
        ).stdout
    )
    chosen = {slot: (item["choice"], item["source"]) for slot, item in told["slots"].items()}
    assert chosen["precision"] == (["no"], "--precision (TORCHPORT_PRECISION)")
    assert chosen["launcher"] == (["local"], "TORCHPORT_LAUNCHER")
    assert chosen["trackers"] == (["jsonl"], f"{file}: trackers (TORCHPORT_TRACKERS)")
    assert told["topology"]["world_size"] == 2


def test_plan_says_which_variable_a_flag_overrides():
    told = torchport("plan", "--precision", "bf16", TORCHPORT_PRECISION="no").stdout
    assert "note: --precision (precision=bf16) overrides TORCHPORT_PRECISION=no" in told


def test_plan_refuses_what_cannot_be_had_and_ends_with_status_2():
    done = torchport("plan", "--backend", "cpus", code=2)
    assert "--backend (TORCHPORT_BACKEND) asks for the backend 'cpus'" in done.stderr
    assert "did you mean 'cpu'? Otherwise: pip install torchport-cpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_refuses_an_unknown_key_of_the_file(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("presicion: bf16\n")
    done = torchport("plan", "--config-file", str(file), code=2)
    assert "unknown key 'presicion'" in done.stderr
    assert "did you mean 'precision'?" in done.stderr


# --- doctor ----------------------------------------------------------------------------------------------------


def test_doctor_finds_no_errors_in_a_healthy_installation():
    done = torchport("doctor")
    assert done.stdout.rstrip().endswith("no errors found")
    assert "torchport-cpu" in done.stdout


def test_doctor_reads_versions_without_importing_torch():
    code = """
import sys
from torchport.plan.discovery import discover
from torchport.plan.doctor import versions
print(versions(discover({}, entry_points=()))["torch"], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    version, imported = done.stdout.split()
    assert version[0].isdigit()
    assert imported == "False"


def test_a_missing_device_is_no_error_for_the_doctor(site):
    site.install("torchport-chip", CHIP)
    assert LONG in torchport("doctor").stdout


def test_doctor_ends_with_status_1_when_a_plugin_is_broken_and_says_what_to_do(site):
    site.install("torchport-nova", BROKEN, version="0.9")
    told = torchport("doctor", code=1).stdout
    assert "torchport-nova 0.9 could not be registered: import failed: ModuleNotFoundError" in told
    assert "export TORCHPORT_DISABLE_PLUGINS=nova" in told
    assert told.rstrip().endswith("1 error")
    assert "Traceback" not in told
    torchport("doctor", TORCHPORT_DISABLE_PLUGINS="nova")


def test_doctor_shows_tracebacks_when_asked(site):
    site.install("torchport-nova", BROKEN)
    told = torchport("doctor", "--verbose", code=1).stdout
    assert "Traceback (most recent call last):" in told
    assert "torchport_nova.py" in told


def test_doctor_as_json(site):
    site.install("torchport-nova", BROKEN)
    told = json.loads(torchport("doctor", "--json", code=1, TORCHPORT_DISABLE_PLUGINS="ghost").stdout)
    assert told["healthy"] is False
    assert [finding["level"] for finding in told["findings"]] == ["error", "warning"]
    assert "TORCHPORT_DISABLE_PLUGINS names 'ghost'" in told["findings"][1]["message"]
    assert told["failures"][0]["plugin"]["distribution"] == "torchport-nova"


def test_doctor_foresees_that_automatic_selection_would_refuse_to_guess(site):
    site.install(
        "torchport-chip",
        CHIP.replace("available=False", "available=True").replace('name="chip"', 'name="chip", priority=0'),
    )
    told = json.loads(torchport("doctor", "--json").stdout)
    assert "chip and cpu are available and equally good (priority 0)" in told["findings"][0]["message"]


# --- commands that do not exist ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("config", "`torchport plan --config-file FILE`"),
        ("env", "`torchport doctor`"),
        ("estimate-memory", "`torchport plan`"),
        ("test", "`torchport conformance cpu`"),
        ("lunch", "Did you mean 'launch'?"),
    ],
)
def test_a_command_that_does_not_exist_names_the_nearest_that_does(name, nearest):
    with pytest.raises(click.UsageError) as caught:
        cli.resolve_command(click.Context(cli), [name])
    assert f"there is no command {name!r}" in caught.value.message
    assert nearest in caught.value.message
