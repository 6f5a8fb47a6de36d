"""`torchport plan`: what would be chosen here, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from torchport import envvars
from torchport.errors import ConfigurationError
from torchport.plan.selection import SLOTS, Plan, Request, slot_variable
from torchport.plugin.specs import Topology


def _slot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each slot."""
    for slot in reversed(SLOTS):
        command = click.option(
            f"--{slot}", metavar="NAME", help=f"Ask for this {slot}, as {slot_variable(slot)} would."
        )(command)
    return command


@click.command()
@_slot_options
@click.option(
    "--config-file",
    metavar="FILE",
    help=f"YAML file of `torchport launch`, as {envvars.CONFIG_FILE} names it.",
)
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Plan for rank 0 of N processes on this machine, instead of for this process.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(config_file: str | None, num_processes: int | None, as_json: bool, **slots: str | None) -> None:
    """Show what would be chosen here, and why.

    Nothing is started: the installed plugins are probed and every slot of the plan is filled as a script
    would fill it, with the source of each choice and the candidates that were not taken.
    """
    from torchport.plan import selection
    from torchport.plan.discovery import discover
    from torchport.plan.topology import detect_topology

    installed = discover(os.environ)
    request = _request(config_file, {slot: name for slot, name in slots.items() if name is not None})
    if num_processes is None:
        topology = detect_topology(os.environ, installed)
    else:
        topology = Topology(
            world_size=num_processes, local_world_size=num_processes, source="--num-processes"
        )
    made = selection.plan(request, os.environ, installed, topology)
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
    else:
        print_plan(made)


def _request(config_file: str | None, arguments: dict[str, str]) -> Request:
    """Put the flags and the configuration file together."""
    path = config_file or os.environ.get(envvars.CONFIG_FILE, "")
    if not path:
        return Request(arguments=arguments, asked_by="flag")
    raise ConfigurationError(f"{path} cannot be read yet")


def print_plan(made: Plan) -> None:
    """Print a plan as tables, for people."""
    from torchport.cli.terminal import make_console, print_table

    console = make_console()
    print_table(
        console,
        "Plan",
        ("slot", "choice", "source"),
        [(decision.slot, decision.name, decision.source) for decision in made.decisions],
    )
    print_table(
        console,
        "Not taken",
        ("slot", "candidate", "reason"),
        [
            (decision.slot, rejection.name, rejection.reason)
            for decision in made.decisions
            for rejection in decision.rejected
        ],
    )
    print_table(
        console,
        "Place in the job",
        ("what", "value"),
        [
            *((key.replace("_", " "), str(value)) for key, value in asdict(made.topology).items()),
            ("distributed type", made.distributed_type),
        ],
    )
    for sentence in (*made.overrides, *made.warnings):
        console.print(f"note: {sentence}")
