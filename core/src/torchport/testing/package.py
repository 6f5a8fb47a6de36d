"""Level L0 of the conformance kit: what can be told of a plugin without its hardware."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from torchport.config import schema
from torchport.plan.discovery import discover
from torchport.plan.registry import Entry, Installed, load_reference, missing_runtime
from torchport.plugin.hookspecs import PROJECT
from torchport.plugin.specs import Probe

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


class PackageConformance:
    """The package level: light import, valid descriptors, an honest probe, a buildable class, metadata.

    Inherit from it in a test module and name the plugin:

    Attributes:
        plugin: Entry-point name of the plugin.
        heavy_modules: Top-level modules that importing the plugin must not import, besides torch and what the
            specs' `runtime` distributions contain.
    """

    plugin: ClassVar[str]
    heavy_modules: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture
    def entry_point(self) -> importlib.metadata.EntryPoint:
        """The plugin's announcement in the metadata of its distribution."""
        points = [p for p in importlib.metadata.entry_points(group=PROJECT) if p.name == self.plugin]
        assert points, f"no installed distribution announces the plugin {self.plugin!r}: pip install -e ."
        assert len(points) == 1, f"{self.plugin!r} is announced by {[p.dist and p.dist.name for p in points]}"
        return points[0]

    @pytest.fixture
    def installed(self) -> Installed:
        """What discovery finds with every plugin switched on."""
        return discover({})

    @pytest.fixture
    def entries(self, entry_point: importlib.metadata.EntryPoint, installed: Installed) -> list[Entry]:
        """Everything that the plugin offers."""
        reasons = [f.reason for f in installed.failures if f.plugin.name == self.plugin]
        if reasons:
            pytest.fail(f"the plugin cannot be registered: {reasons[0]}", pytrace=False)
        tables = installed.entries.values()
        return [entry for table in tables for entry in table.values() if entry.plugin.name == self.plugin]

    def test_it_is_registered_and_offers_something(self, entries: list[Entry]) -> None:
        """All hooks are spelt right, return valid descriptors and clash with no other plugin."""
        assert entries, "no hook of the plugin offers anything (or all of it clashes: torchport doctor)"

    def test_importing_it_is_light(
        self, entry_point: importlib.metadata.EntryPoint, entries: list[Entry]
    ) -> None:
        """Importing the plugin and its configuration imports neither torch nor the vendor's runtime."""
        configs = [entry.spec.config.partition(":")[0] for entry in entries if entry.spec.config]
        loaded = _modules_after_importing([entry_point.module, *configs])
        heavy = {"torch", *self.heavy_modules, *_modules_of(entries)}
        assert not heavy & loaded, f"importing {entry_point.module} (or {configs}) imports {heavy & loaded}"

    def test_probes_answer_with_a_reason_and_never_raise(self, entries: list[Entry]) -> None:
        """A probe returns a `Probe`; one that is not available says why."""
        for entry in entries:
            reference = getattr(entry.spec, "probe", "")
            if not reference or missing_runtime(entry.spec.runtime):
                continue  # without its runtime the probe is not called, and the reason is what is missing
            answer = load_reference(reference)()
            assert isinstance(answer, Probe), f"{reference} returned {answer!r}"
            assert answer.available or answer.reason, f"{reference} gave no reason"
            assert not (answer.available and answer.reason), f"{reference} is available, but: {answer.reason}"

    def test_factories_name_complete_classes(self, entries: list[Entry]) -> None:
        """Each factory can be imported and implements every abstract method of its interface."""
        for entry in entries:
            if missing_runtime(entry.spec.runtime):
                continue  # the class cannot be imported here; the probe's reason says so
            factory = load_reference(entry.spec.factory)
            interface = load_reference(_INTERFACES[entry.spec.kind])
            if entry.spec.kind == "command":
                assert isinstance(factory, interface), f"{entry.spec.factory} is no click command"
                continue
            assert inspect.isclass(factory), f"{entry.spec.factory} is not a class"
            assert issubclass(factory, interface), f"{entry.spec.factory} is no {interface.__name__}"
            missing = sorted(getattr(factory, "__abstractmethods__", ()))
            assert not missing, f"{entry.spec.factory} leaves out {missing}"

    def test_settings_explain_themselves(self, entries: list[Entry]) -> None:
        """Each configuration dataclass has defaults for every field, and help for every setting."""
        for entry in entries:
            if not entry.spec.config:
                continue
            config = load_reference(entry.spec.config)
            config()
            for item in schema.settings_of(config):
                assert item.help, f"{entry.spec.config}: {item.name} has no help"

    def test_specs_have_a_summary(self, entries: list[Entry]) -> None:
        """`torchport plugins` has a line for each."""
        for entry in entries:
            assert entry.spec.summary, f"{entry.spec.kind} {entry.spec.name} has no summary"

    def test_metadata_is_complete(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """The distribution has a summary, a readme, a Python range and the range of cores it is for."""
        assert entry_point.dist is not None
        metadata: Any = entry_point.dist.metadata
        for key in ("Summary", "Requires-Python"):
            assert metadata[key], f"the distribution has no {key}"
        readme = metadata["Description"] or metadata.get_payload() or ""
        assert readme.strip(), "the distribution has no readme"
        core = [text for text in entry_point.dist.requires or () if text.startswith("torchport-core")]
        assert core, "the distribution does not require torchport-core"
        assert "<" in core[0] or "~=" in core[0], f"{core[0]} has no upper end: a new seam would break users"


def _modules_after_importing(modules: list[str]) -> set[str]:
    """Import modules in a fresh interpreter and return the top-level modules that are then loaded."""
    command = [sys.executable, "-c", _IMPORT, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"importing {modules} fails in a fresh interpreter:\n{done.stderr}"
    return set(json.loads(done.stdout.splitlines()[-1]))


def _modules_of(entries: list[Entry]) -> set[str]:
    """Name the top-level modules of the distributions that the specs name as their runtime."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    runtime = {canonicalize_name(Requirement(text).name) for entry in entries for text in entry.spec.runtime}
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if runtime & {canonicalize_name(name) for name in distributions}
    }
