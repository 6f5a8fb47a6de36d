"""Settings of strategies that were not chosen: what was asked for is refused or mentioned, never ignored."""

from __future__ import annotations

from collections.abc import Iterator

from torchport import aliases, envvars
from torchport.config import schema
from torchport.errors import ConfigurationError
from torchport.plan.decision import Decision
from torchport.plan.registry import load_reference
from torchport.plan.request import Sources
from torchport.plugin.specs import Spec, StrategySpec


def unused_settings(strategy: Decision, sources: Sources) -> tuple[str, ...]:
    """Return one sentence for each other strategy to which flags or the file have given settings.

    Only what flags and the file say counts: a variable set by the user may be meant for every job of a machine.
    Where nobody asked for a strategy, settings of one that automatic choice takes for another number of
    processes are left alone: the same file starts one process or many.

    Raises:
        ConfigurationError: if nobody asked for a strategy, and the settings are of one that must be asked for.
    """
    given = {
        variable: origin
        for variable, origin in envvars.origins(sources.environment).items()
        if not envvars.is_own(variable)
    }
    given = {variable: given[variable] for variable in given.keys() - set(_variables(strategy.spec))}
    if not given:
        return ()
    readers: dict[str, list[StrategySpec]] = {}
    for spec in sources.installed.specs("strategy"):
        for variable in _variables(spec):
            if variable in given:
                readers.setdefault(variable, []).append(spec)
    unused: dict[tuple[str, ...], list[str]] = {}  # origins, by the strategies that would read them
    for variable, specs in sorted(readers.items()):
        if not (strategy.automatic and any(spec.priority > 0 for spec in specs)):
            unused.setdefault(tuple(spec.name for spec in specs), []).append(given[variable])
    sentences = []
    for names, origins in unused.items():
        listed, many = ", ".join(dict.fromkeys(origins)), len(origins) > 1
        whose = f"{'settings' if many else 'a setting'} of the strategy {' or '.join(map(repr, names))}"
        if strategy.automatic:
            raise ConfigurationError(
                f"{listed}: {whose}, which was not chosen",
                found=f"strategy {strategy.name!r} ({strategy.source})",
                reason="that one is taken only when asked for",
                hint=f"--strategy {names[0]}, or leave {'them' if many else 'it'} out",
            )
        verb = "are" if many else "is"
        sentences.append(
            f"{listed} {verb} not used: {whose}; the strategy is {strategy.name!r}, asked for by {strategy.source}"
        )
    return tuple(sentences)


def _variables(spec: Spec | None) -> Iterator[str]:
    """The variables of a strategy's settings, less those that choose a launcher."""
    if spec is None or not spec.config:
        return
    try:
        settings = schema.settings_of(load_reference(spec.config))
    except Exception:  # whoever needs them says so
        return
    yield from (item.env for item in settings if item.env and item.yaml not in aliases.MACHINE_LAUNCHERS)
