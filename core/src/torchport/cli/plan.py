"""`torchport plan`: what would be chosen here, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from torchport import envvars
from torchport.plan.selection import SLOTS, Plan, slot_variable

if TYPE_CHECKING:
    from torchport.config.launch import LaunchConfig
    from torchport.plugin.specs import Topology


def _slot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each slot."""
    for slot in reversed(SLOTS):
        text = f"Ask for this {slot}, as {slot_variable(slot)} would."
        command = click.option(f"--{slot}", metavar="NAME", help=text)(command)
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
    "-n",
    type=click.IntRange(min=1),
    metavar="N",
    help="Plan for rank 0 of N processes, instead of for this process.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(as_json: bool, **flags: Any) -> None:
    """Show what would be chosen here, and why.

    Nothing is started: the installed plugins are probed and every slot of the plan is filled as a script
    would fill it, with the source of each choice and the candidates that were not taken.
    """
    made = make_plan({name: value for name, value in flags.items() if value is not None})
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
    else:
        print_plan(made)


def make_plan(flags: dict[str, Any]) -> Plan:
    """Resolve the plan of a process that `torchport launch` would start with these flags.

    Args:
        flags: By field of `LaunchConfig`.

    Raises:
        TorchportError: if a slot cannot be filled, or the configuration is not valid.
    """
    from torchport.config.layers import Layer, resolve
    from torchport.config.plugins import apply_settings, plugin_settings
    from torchport.plan.discovery import discover
    from torchport.plan.selection import Request
    from torchport.plan.selection import plan as select

    layer = Layer()
    for name, value in flags.items():
        layer.put(name, value, f"--{name.replace('_', '-')}")
    resolved = resolve(layer, os.environ)
    installed = discover(resolved.environ)
    if resolved.sections:
        plugins, broken = plugin_settings(installed)
        resolved = apply_settings(resolved, {}, plugins, broken)
    request = Request(settings=resolved.sections, config_file=resolved.config_file)
    topology = _topology(resolved.config, "num_processes" in flags, installed)
    made = select(request, resolved.environ, installed, topology)
    return replace(made, overrides=(*resolved.overrides, *made.overrides))


def _topology(config: LaunchConfig, asked: bool, installed: Any) -> Topology:
    """Return the place of this process; or of rank 0 of the job that is configured, where this is none."""
    from torchport.plan.topology import detect_topology
    from torchport.plugin.specs import Topology

    here = detect_topology(os.environ, installed)
    if config.num_processes is None or (here != Topology() and not asked):
        return here
    return Topology(
        world_size=config.num_processes,
        local_world_size=max(1, config.num_processes // config.num_machines),
        num_nodes=config.num_machines,
        source="not started yet",
    )


def print_plan(made: Plan) -> None:
    """Print a plan as tables, for people."""
    from torchport.cli.terminal import make_console, print_table

    console = make_console()
    print_table(
        console,
        "Plan",
        ("slot", "choice", "source"),
        made.rows(),
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
            *((key.replace("_", " "), str(value) or "-") for key, value in asdict(made.topology).items()),
            ("distributed type", made.distributed_type),
        ],
    )
    for sentence in (*made.overrides, *made.warnings):
        console.print(f"note: {sentence}")
