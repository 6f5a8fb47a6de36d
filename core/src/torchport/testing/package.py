"""Level L0 of the conformance kit: what can be told of a plugin without its hardware."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchport.config import schema
from torchport.errors import SelectionError
from torchport.plan.registry import CORE, Entry, load_reference
from torchport.plugin.hookspecs import PROJECT
from torchport.plugin.installation import missing_runtime
from torchport.plugin.specs import Probe
from torchport.testing.checks import HERE, Check, Checks, Place, Subject, everything, require

_INTERFACES = {
    "backend": "torchport.plugin.backend:Backend",
    "collectives": "torchport.plugin.collectives:Collectives",
    "precision": "torchport.plugin.precision:Precision",
    "strategy": "torchport.plugin.strategy:Strategy",
    "launcher": "torchport.plugin.launcher:Launcher",
    "tracker": "torchport.plugin.tracker:Tracker",
    "quantizer": "torchport.plugin.quantizer:Quantizer",
    "command": "click:Command",
}

_IMPORT = """
import importlib, json, sys
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@dataclass(frozen=True)
class Package:
    """A plugin as a package.

    Attributes:
        module: The module that holds its hooks.
        distribution: Its installed metadata; `None` if it is run from sources that are not installed.
        entries: What it offers, as far as it is tested.
        heavy_modules: Top-level modules that importing it must not import, besides torch and what the specs'
            `runtime` distributions contain.
    """

    module: str
    distribution: importlib.metadata.Distribution | None
    entries: Sequence[Entry]
    heavy_modules: tuple[str, ...] = ()


def entry_point_of(plugin: str) -> importlib.metadata.EntryPoint:
    """Return the plugin's announcement in the metadata of its distribution."""
    points = [p for p in importlib.metadata.entry_points(group=PROJECT) if p.name == plugin]
    require(points, f"no installed distribution announces the plugin {plugin!r}: pip install -e .")
    named = [p.dist and p.dist.name for p in points]
    require(len(points) == 1, f"{plugin!r} is announced by {named}")
    return points[0]


def entries_of(plugin: str) -> list[Entry]:
    """Return everything that a plugin offers."""
    installed = everything()
    reasons = [f.reason for f in installed.failures if f.plugin.name == plugin]
    require(not reasons, f"the plugin cannot be registered: {''.join(reasons[:1])}")
    tables = installed.entries.values()
    return [entry for table in tables for entry in table.values() if entry.plugin.name == plugin]


@contextmanager
def package_bench(subject: Subject, place: Place) -> Iterator[Package]:
    """Find the package that a subject comes in."""
    try:
        entry = subject.entry
    except SelectionError as error:
        near = [f"{f.plugin.name}: {f.reason}" for f in everything().failures]
        require(False, f"{error.problem}; could not be registered: {near}" if near else str(error))
        raise
    if entry.plugin.distribution == CORE:
        yield Package(
            "torchport.builtin", importlib.metadata.distribution(CORE), [entry], subject.heavy_modules
        )
        return
    point = entry_point_of(entry.plugin.name)
    yield Package(point.module, point.dist, [entry], subject.heavy_modules)


_checks = Checks("L0", package_bench, HERE)


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    return list(_checks)


@_checks("package.offers-something", "all hooks are spelt right and return valid descriptors")
def is_registered_and_offers_something(package: Package) -> None:
    """Check that there is something to test."""
    require(package.entries, "no hook of the plugin offers anything (or all of it clashes: torchport doctor)")


@_checks("package.light-import", "importing it imports neither torch nor the vendor's runtime")
def importing_is_light(package: Package) -> None:
    """Import the plugin and its configuration in a fresh interpreter."""
    configs = [entry.spec.config.partition(":")[0] for entry in package.entries if entry.spec.config]
    loaded = _modules_after_importing([package.module, *configs])
    heavy = {"torch", *package.heavy_modules, *_modules_of(package.entries)}
    require(not heavy & loaded, f"importing {package.module} (or {configs}) imports {sorted(heavy & loaded)}")


@_checks("package.probe", "its probe answers with a Probe and a reason, and never raises")
def probes_answer_with_a_reason(package: Package) -> None:
    """Call the probes whose runtime is there; without it they are not called, and the reason is what is missing."""
    for entry in package.entries:
        reference = getattr(entry.spec, "probe", "")
        if not reference or missing_runtime(entry.spec.runtime):
            continue
        try:
            answer = load_reference(reference)()
        except (Exception, SystemExit) as error:
            require(False, f"{reference} raised {type(error).__name__}: {error}")
        require(isinstance(answer, Probe), f"{reference} returned {answer!r}")
        require(answer.available or answer.reason, f"{reference} gave no reason")
        wrong = answer.available and answer.reason
        require(not wrong, f"{reference} is available, but: {answer.reason}")


@_checks("package.complete-class", "its factory implements every abstract method of the interface")
def factories_name_complete_classes(package: Package) -> None:
    """Import each factory whose runtime is there."""
    for entry in package.entries:
        if missing_runtime(entry.spec.runtime):
            continue  # the class cannot be imported here; the probe's reason says so
        factory = load_reference(entry.spec.factory)
        interface = load_reference(_INTERFACES[entry.spec.kind])
        if entry.spec.kind == "command":
            require(isinstance(factory, interface), f"{entry.spec.factory} is no click command")
            continue
        require(inspect.isclass(factory), f"{entry.spec.factory} is not a class")
        require(issubclass(factory, interface), f"{entry.spec.factory} is no {interface.__name__}")
        missing = sorted(getattr(factory, "__abstractmethods__", ()))
        require(not missing, f"{entry.spec.factory} leaves out {missing}")


@_checks("package.settings", "its settings have defaults, and help for each")
def settings_explain_themselves(package: Package) -> None:
    """Build each configuration dataclass without arguments."""
    for entry in package.entries:
        if not entry.spec.config:
            continue
        config = load_reference(entry.spec.config)
        config()
        for item in schema.settings_of(config):
            require(item.help, f"{entry.spec.config}: {item.name} has no help")


@_checks("package.summary", "`torchport plugins` has a line for it")
def specs_have_a_summary(package: Package) -> None:
    """Check the descriptors' summaries."""
    for entry in package.entries:
        require(entry.spec.summary, f"{entry.spec.kind} {entry.spec.name} has no summary")


@_checks("package.metadata", "its distribution has a summary, a readme, and ranges of Python and of the core")
def metadata_is_complete(package: Package) -> None:
    """Check what an index and a resolver read."""
    found = package.distribution
    if found is None:
        raise AssertionError("its distribution is not installed: pip install -e .")
    metadata: Any = found.metadata
    for key in ("Summary", "Requires-Python"):
        require(metadata[key], f"the distribution has no {key}")
    readme = metadata["Description"] or metadata.get_payload() or ""
    require(readme.strip(), "the distribution has no readme")
    if found.name == CORE:
        return
    core = [text for text in found.requires or () if text.startswith(CORE)]
    require(core, f"the distribution does not require {CORE}")
    bounded = any(sign in core[0] for sign in ("<", "~="))
    require(bounded, f"{core[0]} has no upper end: a new seam would break users")


def _modules_after_importing(modules: list[str]) -> set[str]:
    """Import modules in a fresh interpreter and return the top-level modules that are then loaded."""
    command = [sys.executable, "-c", _IMPORT, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    require(done.returncode == 0, f"importing {modules} fails in a fresh interpreter:\n{done.stderr}")
    return set(json.loads(done.stdout.splitlines()[-1]))


def _modules_of(entries: Sequence[Entry]) -> set[str]:
    """Name the top-level modules of the distributions that the specs name as their runtime."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    runtime = {canonicalize_name(Requirement(text).name) for entry in entries for text in entry.spec.runtime}
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if runtime & {canonicalize_name(name) for name in distributions}
    }
