"""What is installed: specs by kind and name, the plugins that brought them, and the plugins that failed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchport.aliases import distribution_of
from torchport.errors import (
    DeniedError,
    DuplicateNameError,
    PluginError,
    SelectionError,
    UnavailableError,
    UnknownPluginError,
)
from torchport.plugin.installation import missing_runtime
from torchport.plugin.specs import KINDS, BackendSpec, Capabilities, Finding, Probe, Spec

CORE = "torchport-core"
"""Distribution name of the core, whose own plugins are always registered."""


class Plugin(NamedTuple):
    """A registered plugin: its entry-point name and the distribution it came in."""

    name: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


class PluginFailure(NamedTuple):
    """A plugin that could not be registered, and why."""

    plugin: Plugin
    reason: str
    traceback: str = ""


class Entry(NamedTuple):
    """A spec and the plugin that brought it."""

    spec: Spec
    plugin: Plugin

    @property
    def labels(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.spec.name, *self.spec.aliases)


def plugin_key(name: str) -> str:
    """Return the form in which plugins' names are compared: `torchport-My_Chip` is `my-chip`."""
    return name.lower().replace("_", "-").removeprefix("torchport-")


def load_reference(reference: str) -> Any:
    """Import what `"module:Name"` refers to; `"module"` alone is the module."""
    module, _, name = reference.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split(".") if name else ():
        value = getattr(value, part)
    return value


@dataclass(slots=True)
class Installed:
    """Everything that discovery found.

    Attributes:
        entries: Specs by kind and name; aliases are resolved by `find`.
        plugins: The plugins that are registered.
        failures: The plugins that are not, and why.
        denied: Names of installed plugins that an allow-list or deny-list keeps out, with the reason.
        clashes: For each (kind, name) that several plugins offer, those plugins. None of them is used.
        warnings: What an operator should hear once.
        observers: Called with each resolved plan; returns what to tell the operator once, and may raise a
            `TorchportError` to veto it.
        findings: Called by `doctor` for what plugins have to report.
        faulty_probes: (kind, name) of each probe that raised or did not answer with a `Probe` and a reason.
    """

    entries: dict[str, dict[str, Entry]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    plugins: list[Plugin] = field(default_factory=list)
    failures: list[PluginFailure] = field(default_factory=list)
    denied: dict[str, str] = field(default_factory=dict)
    clashes: dict[tuple[str, str], tuple[Plugin, ...]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    observers: list[Callable[[Any], Iterable[str]]] = field(default_factory=list)
    findings: list[Callable[[], Iterable[Finding]]] = field(default_factory=list)
    faulty_probes: set[tuple[str, str]] = field(default_factory=set)
    _offered: list[Entry] = field(default_factory=list)
    _probes: dict[tuple[str, str], Probe] = field(default_factory=dict)
    _capabilities: dict[str, Capabilities] = field(default_factory=dict)

    def specs(self, kind: str) -> tuple[Any, ...]:
        """Return all usable specs of a kind, in order of name."""
        return tuple(entry.spec for _, entry in sorted(self.entries[kind].items()))

    def add(self, entries: Iterable[Entry]) -> None:
        """Add specs, of one plugin or of several.

        A name (or alias) that several plugins offer is a clash: none of their specs can be used under any of
        its names, so that the order of installation decides nothing. The core's own specs always stay.
        """
        self._offered.extend(entries)
        offers: dict[tuple[str, str], list[Plugin]] = {}
        for entry in self._offered:
            for label in entry.labels:
                offers.setdefault((entry.spec.kind, label), []).append(entry.plugin)
        self.clashes = {key: tuple(plugins) for key, plugins in offers.items() if len(plugins) > 1}
        self.entries = {kind: {} for kind in KINDS}
        for entry in self._offered:
            if entry.plugin.distribution == CORE or not self._contested(entry):
                self.entries[entry.spec.kind][entry.spec.name] = entry

    def _contested(self, entry: Entry) -> list[str]:
        return [label for label in entry.labels if (entry.spec.kind, label) in self.clashes]

    def configured_by(self, value: Any) -> bool:
        """Whether `value` is an instance of some installed plugin's settings."""
        names = {f"{kind.__module__}:{kind.__qualname__}" for kind in type(value).__mro__}
        return any(entry.spec.config in names for table in self.entries.values() for entry in table.values())

    def find(self, kind: str, name: str, wanted_by: str) -> Entry:
        """Return the entry of this name or alias.

        Raises:
            DuplicateNameError: if several distributions offer it.
            DeniedError: if a plugin of that name is kept out by a list.
            PluginError: if a plugin of that name is installed but failed to register.
            UnknownPluginError: otherwise; with the nearest name and the package to install.
        """
        for entry in self.entries[kind].values():
            if name in entry.labels:
                return entry
        wanted = f"{wanted_by} asks for the {kind} {name!r}"
        for entry in self._offered:
            if entry.spec.kind == kind and name in entry.labels:
                raise self._duplicate(kind, self._contested(entry)[0], wanted)
        raise self._not_found(kind, name, wanted)

    def _duplicate(self, kind: str, label: str, wanted: str) -> DuplicateNameError:
        clash = self.clashes[kind, label]
        hint = "uninstall one of them"
        if len({plugin.name for plugin in clash}) > 1:
            hint += f", or switch it off: export TORCHPORT_DISABLE_PLUGINS={clash[-1].name}"
        return DuplicateNameError(
            f"{wanted}, but several installed plugins offer a {kind} {label!r}",
            found=" and ".join(map(str, clash)),
            reason="which of them would run must not depend on the order of installation",
            hint=hint,
        )

    def _not_found(self, kind: str, name: str, wanted: str) -> SelectionError | PluginError:
        """Say why there is no such entry: kept out, broken, or not installed."""
        for denied, reason in self.denied.items():
            if plugin_key(denied) == plugin_key(name):
                return DeniedError(
                    f"{wanted}, which is switched off",
                    reason=reason,
                    hint="change that variable, or ask for another: torchport plugins",
                )
        for failure in self.failures:
            if plugin_key(name) in (plugin_key(failure.plugin.name), plugin_key(failure.plugin.distribution)):
                return PluginError(
                    f"{wanted}, whose plugin could not be registered",
                    found=str(failure.plugin),
                    reason=failure.reason,
                    hint="torchport doctor --verbose",
                )
        import difflib

        known = [label for entry in self.entries[kind].values() for label in entry.labels]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        install = f"pip install {distribution_of(kind, name)}"
        broken = ", ".join(failure.plugin.name for failure in self.failures)
        off = ", ".join(sorted(self.denied))
        reasons = [f"could not be registered: {broken} (see torchport doctor)"] if broken else []
        reasons += [f"switched off: {off}"] if off else []
        return UnknownPluginError(
            f"{wanted}, but no installed plugin offers it",
            found=", ".join(sorted(self.entries[kind])) or "none",
            reason="; ".join(reasons),
            hint=f"did you mean {near[0]!r}? Otherwise: {install}" if near else install,
        )

    def probe(self, spec: Any) -> Probe:
        """Check a spec's runtime requirements, then call its probe; the answer is kept."""
        key = (spec.kind, spec.name)
        if key not in self._probes:
            self._probes[key], fault = _probe(spec)
            if fault:
                self.faulty_probes.add(key)
        return self._probes[key]

    def capabilities(self, spec: BackendSpec) -> Capabilities:
        """Build the backend to ask what its device can do; the answer is kept."""
        if spec.name not in self._capabilities:
            try:
                backend = load_reference(spec.factory)(spec)
                self._capabilities[spec.name] = backend.capabilities()
            except (Exception, SystemExit) as error:
                raise UnavailableError(
                    f"backend {spec.name!r} cannot be built",
                    found=f"factory {spec.factory}",
                    reason=f"{type(error).__name__}: {error}",
                    hint=how_to_check(spec),
                ) from error
        return self._capabilities[spec.name]


def how_to_check(spec: Spec) -> str:
    """Return the command that builds a plugin and checks it: what to type where its factory has failed."""
    return f"torchport conformance {spec.name} --kind {spec.kind} --level L0"


def _probe(spec: Any) -> tuple[Probe, bool]:
    """Probe, and say whether the probe itself is at fault."""
    reason = missing_runtime(spec.runtime)
    if reason:
        return Probe(available=False, reason=reason), False
    reference: str = getattr(spec, "probe", "")
    if not reference:
        return Probe(available=True), False
    fault = ""
    try:
        answer = load_reference(reference)()
    except (Exception, SystemExit) as error:
        fault = f"its probe {reference} raised {type(error).__name__}: {error}"
    else:
        if not isinstance(answer, Probe):
            fault = f"its probe {reference} returned {answer!r} instead of a Probe"
        elif not answer.available and not answer.reason:
            fault = f"its probe {reference} gave no reason"
        else:
            return answer, False
    return Probe(available=False, reason=fault), True
