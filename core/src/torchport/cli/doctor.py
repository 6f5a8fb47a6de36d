"""`torchport doctor`: check this machine and what is installed on it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torchport.plan.doctor import Report


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Print the traceback of every plugin that failed.")
def doctor(as_json: bool, verbose: bool) -> None:
    """Check this machine: failures with causes, probes, versions.

    Exits with status 1 if there are errors. That a device is not there is no error; that a plugin cannot be
    registered, or that two offer the same name, is.
    """
    from torchport.plan.discovery import discover
    from torchport.plan.doctor import examine

    report = examine(discover(os.environ))
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report, verbose)
    sys.exit(0 if report.healthy else 1)


def _print(report: Report, verbose: bool) -> None:
    from torchport.cli.terminal import make_console, print_table

    console = make_console()
    print_table(console, "Versions", ("what", "version"), report.versions.items())
    print_table(
        console,
        "Probes",
        ("kind", "name", "available", "what was found"),
        [
            (
                probe.kind,
                probe.name,
                "yes" if probe.available else "no",
                probe.reason or ", ".join(f"{key} {value}" for key, value in probe.details.items()),
            )
            for probe in report.probes
        ],
    )
    print_table(console, "Switched off", ("plugin", "reason"), sorted(report.denied.items()))
    print_table(
        console,
        "Findings",
        ("level", "about", "what was found", "what to do"),
        [
            (finding.level, finding.subject, finding.message, finding.remedy or "-")
            for finding in report.findings
        ],
        style="bold" if report.healthy else "bold red",
    )
    if verbose:
        for failure in report.failures:
            if failure.traceback:
                console.rule(f"{failure.plugin.name} ({failure.plugin})", align="left")
                click.echo(failure.traceback)
    errors = sum(finding.level == "error" for finding in report.findings)
    console.print(f"{errors} error{'s' * (errors != 1)}" if errors else "no errors found")
