"""`torchport plugins`: what is installed, and what each plugin offers."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from torchport.plan.registry import Entry, Installed
from torchport.plugin.specs import KINDS


@click.command()
@click.option("--kind", type=click.Choice(list(KINDS)), help="Only plugins of this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plugins(kind: str | None, as_json: bool) -> None:
    """List the installed plugins and what they offer.

    Each is probed: "available" says whether it could be used on this machine now. Plugins that failed, clash
    or are switched off follow below; `torchport doctor` says more about them.
    """
    from torchport.plan.discovery import discover

    installed = discover(os.environ)
    listing = describe_plugins(installed, [kind] if kind else list(KINDS))
    if as_json:
        click.echo(json.dumps(listing, indent=2))
    else:
        _print(listing)


def describe_plugins(installed: Installed, kinds: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what `torchport plugins --json` prints."""
    return {
        "plugins": [
            _describe(entry, installed)
            for kind in kinds
            for _, entry in sorted(installed.entries[kind].items())
        ],
        "failures": [
            {
                "plugin": failure.plugin.name,
                "distribution": failure.plugin.distribution,
                "version": failure.plugin.version,
                "reason": failure.reason,
            }
            for failure in installed.failures
        ],
        "clashes": [
            {"kind": kind, "name": name, "distributions": [str(plugin) for plugin in offering]}
            for (kind, name), offering in sorted(installed.clashes.items())
        ],
        "denied": [{"plugin": name, "reason": reason} for name, reason in sorted(installed.denied.items())],
    }


def _describe(entry: Entry, installed: Installed) -> dict[str, Any]:
    probe = installed.probe(entry.spec)
    return {
        "kind": entry.spec.kind,
        "name": entry.spec.name,
        "aliases": list(entry.spec.aliases),
        "distribution": entry.plugin.distribution,
        "version": entry.plugin.version,
        "summary": entry.spec.summary,
        "available": probe.available,
        "reason": probe.reason,
        "details": dict(probe.details),
    }


def _print(listing: dict[str, list[dict[str, Any]]]) -> None:
    from torchport.cli.terminal import make_console, print_table

    console = make_console()
    print_table(
        console,
        "Plugins",
        ("kind", "name", "from", "summary", "available"),
        [
            (
                item["kind"],
                item["name"],
                f"{item['distribution']} {item['version']}",
                item["summary"],
                "yes" if item["available"] else f"no: {item['reason']}",
            )
            for item in listing["plugins"]
        ],
    )
    print_table(
        console,
        "Could not be registered",
        ("plugin", "from", "reason"),
        [
            (item["plugin"], f"{item['distribution']} {item['version']}", item["reason"])
            for item in listing["failures"]
        ],
        style="bold red",
    )
    print_table(
        console,
        "Offered by several, so not used",
        ("kind", "name", "by"),
        [(item["kind"], item["name"], " and ".join(item["distributions"])) for item in listing["clashes"]],
        style="bold red",
    )
    print_table(
        console,
        "Switched off",
        ("plugin", "reason"),
        [(item["plugin"], item["reason"]) for item in listing["denied"]],
    )
