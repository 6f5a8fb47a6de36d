"""The `torchport` command. Each sub-command is a module of its own, imported when it is called."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from torchport.errors import TorchportError

_COMMANDS = {
    "launch": ("torchport.cli.launch:launch", "Start a script in one or many processes."),
    "plan": ("torchport.cli.plan:plan", "Show what would be chosen here, and why."),
    "plugins": ("torchport.cli.plugins:plugins", "List the installed plugins and what they offer."),
    "doctor": ("torchport.cli.doctor:doctor", "Check this machine: failures with causes, probes, versions."),
    "conformance": ("torchport.cli.conformance:conformance", "Prove what a plugin claims: its scorecard."),
    "new-plugin": (
        "torchport.cli.new_plugin:new_plugin",
        "Write the skeleton of a plugin that passes its tests.",
    ),
}
"""The core's own sub-commands: where each is defined, and its line in `--help`."""


class LazyGroup(click.Group):
    """A group that knows the names of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the core's commands and those of installed plugins."""
        return [*_COMMANDS, *sorted(self._plugin_commands())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        from torchport.plan.registry import load_reference

        if name in _COMMANDS:
            command: click.Command = load_reference(_COMMANDS[name][0])
            return command
        spec = self._plugin_commands().get(name)
        if spec is None:
            return None
        added: click.Command = load_reference(spec.factory)
        return added

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add the nearest known command to the error for an unknown one."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            import difflib

            from torchport.aliases import COMMANDS

            if name in COMMANDS:
                ctx.fail(f"there is no command {name!r}: {COMMANDS[name]}.")
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " Try 'torchport --help'."
            ctx.fail(f"there is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in `--help` without importing them."""
        rows = [(name, help_line) for name, (_, help_line) in _COMMANDS.items()]
        rows += [(name, spec.summary) for name, spec in sorted(self._plugin_commands().items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    @staticmethod
    def _plugin_commands() -> dict[str, Any]:
        from torchport.plan.discovery import discover

        return {spec.name: spec for spec in discover(os.environ).specs("command")}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torchport-core", prog_name="torchport")
def cli() -> None:
    """Run the same PyTorch script on any hardware, with any sharding strategy, by installing a plugin."""


def main() -> None:
    """Run the command line; a `TorchportError` is printed without a traceback and exits with status 2."""
    try:
        cli(prog_name="torchport")
    except TorchportError as error:
        click.echo(f"torchport: {error}", err=True)
        sys.exit(2)
