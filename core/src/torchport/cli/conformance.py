"""`torchport conformance`: run the conformance kit on an installed plugin and show its scorecard."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from torchport.errors import ConfigurationError, TorchportError, UnknownPluginError
from torchport.plugin.specs import KINDS
from torchport.testing.scorecard import LEVELS, VERIFIED_ON, Scorecard

_KINDS = tuple(kind for kind in KINDS if kind != "command")


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(_KINDS), help="Kind of plugin, where several have this name.")
@click.option(
    "--level",
    "levels",
    type=click.Choice(list(LEVELS)),
    multiple=True,
    help="Only this level; may be repeated.",
)
@click.option("--backend", default="", help="Backend to test collectives, strategies and precisions on.")
@click.option("--collectives", default="", help="Collectives of jobs of several processes.")
@click.option("--strategy", "strategies", multiple=True, help="Strategy to train with; may be repeated.")
@click.option("--precision", "precisions", multiple=True, help="Precision to train in; may be repeated.")
@click.option("--launcher", default="", help="How jobs of several processes are started.")
@click.option("--processes", default=2, show_default=True, help="Number of processes of these jobs.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds that one check may take.")
@click.option(
    "--verified-on", type=click.Choice(VERIFIED_ON), default=None, help="How this run verifies the plugin."
)
@click.option(
    "--suite", default="", metavar="MODULE:CLASS", help="The author's own suite, whose settings count."
)
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the scorecard here."
)
@click.option("--verbose", is_flag=True, help="Show the checks that passed, too.")
def conformance(
    name: str, kind: str | None, path: Path | None, suite: str, verbose: bool, **told: object
) -> None:
    """Run the conformance kit on the plugin NAME and show its scorecard.

    Exits with status 1 if a check fails. What the plugin does not claim is listed with the reason.
    """
    card = _run(name, kind, suite, {key: value for key, value in told.items() if value})
    if path is not None:
        card.write(path)
    _print(card, verbose)
    if not card.passed:
        sys.exit(1)


def _run(name: str, kind: str | None, suite: str, told: dict[str, object]) -> Scorecard:
    from torchport.testing import runner
    from torchport.testing.checks import Subject, find_suite

    kind = kind or _kind_of(name)
    if kind in ("collectives", "strategy", "precision") and "backend" not in told:
        told["backend"] = _backend_for(kind, name)
    subject, reader = find_suite(suite, Subject(kind=kind, name=name, **told), told)  # type: ignore[arg-type]
    return runner.run(subject, suite=reader, tell=lambda text: click.echo(f"torchport: {text}", err=True))


def _kind_of(name: str) -> str:
    """Find the kind of the one plugin that has this name."""
    from torchport.testing.checks import everything

    installed = everything()
    kinds = [
        kind for kind in _KINDS if any(name in entry.labels for entry in installed.entries[kind].values())
    ]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise ConfigurationError(
            f"several plugins are called {name!r}", found=" and ".join(kinds), hint=f"--kind {kinds[0]}"
        )
    failures = [f"{failure.plugin.name}: {failure.reason}" for failure in installed.failures]
    raise UnknownPluginError(
        f"no installed plugin is called {name!r}",
        reason=f"could not be registered: {'; '.join(failures)}" if failures else "",
        hint="torchport plugins",
    )


def _backend_for(kind: str, name: str) -> str:
    """Choose the backend to test on: for collectives, one whose tensors they carry; the best available one."""
    from torchport.plugin.specs import BackendSpec, CollectivesSpec
    from torchport.testing.checks import everything

    installed = everything()
    spec = installed.find(kind, name, "torchport conformance").spec
    backends: list[BackendSpec] = list(installed.specs("backend"))
    if isinstance(spec, CollectivesSpec):
        carried = [b for b in backends if not spec.device_types or b.device_type in spec.device_types]
        backends = [b for b in carried if b.collectives == name] or carried
    for backend in sorted(backends, key=lambda b: -b.priority):
        if installed.probe(backend).available:
            return backend.name
    raise TorchportError(f"no backend to test the {kind} {name!r} on is available", hint="torchport doctor")


def _print(card: Scorecard, verbose: bool) -> None:
    from torchport.cli.terminal import make_console, print_table

    console = make_console()
    shown = [row for row in card.rows() if verbose or row[2] != "pass"]
    print_table(
        console, f"Conformance of {card.kind} {card.name}", ("level", "check", "result", "what"), shown
    )
    for line in card.in_words().splitlines():
        console.print(line)
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items() if version)
    console.print(f"{card.date}, {card.device_count} x {card.device_name}, {card.platform}, {versions}")
    console.print(f"verified on: {card.verified_on or 'not said: --verified-on'}")
