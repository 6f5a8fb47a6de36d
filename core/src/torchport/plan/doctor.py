"""What there is to say about an installation: versions, failures with causes, probes, findings."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torchport.plan.registry import CORE, Installed, PluginFailure
from torchport.plugin.specs import KINDS, Finding

_LIBRARIES = ("torch", "numpy", "pluggy", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """What one plugin's probe answered."""

    kind: str
    name: str
    distribution: str
    available: bool
    count: int
    reason: str
    details: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of an examination.

    Attributes:
        versions: Of Python, the operating system, the core, libraries and plugins; from metadata alone.
        probes: The answer of every plugin that can be probed or has runtime requirements.
        failures: Plugins that could not be registered, with tracebacks.
        findings: Everything to act on, errors first: failures, clashes, warnings, and what plugins report.
        denied: Names of plugins that are switched off, with the reason.
    """

    versions: dict[str, str]
    probes: tuple[Availability, ...]
    failures: tuple[PluginFailure, ...]
    findings: tuple[Finding, ...]
    denied: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether there are no errors. An unavailable device is no error: nobody asked for it."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "healthy": self.healthy,
            "versions": self.versions,
            "probes": [asdict(probe) for probe in self.probes],
            "failures": [
                failure._asdict() | {"plugin": failure.plugin._asdict()} for failure in self.failures
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "denied": self.denied,
        }


def examine(installed: Installed) -> Report:
    """Probe everything that is installed and collect all that an operator should know."""
    probes = tuple(_probes(installed))
    findings = [*_failures(installed), *_clashes(installed), *_faulty_probes(installed)]
    findings += [*_warnings(installed), *_backends(installed)]
    findings += [finding for report in installed.findings for finding in report()]
    order = ("error", "warning", "info")
    return Report(
        versions=versions(installed),
        probes=probes,
        failures=tuple(installed.failures),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.level))),
        denied=dict(installed.denied),
    )


def versions(installed: Installed) -> dict[str, str]:
    """Return versions by name, read from metadata: nothing is imported for it."""
    found = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}",
        CORE: _version(CORE),
        **{name: _version(name) for name in _LIBRARIES},
    }
    for plugin in installed.plugins:
        found.setdefault(plugin.distribution, plugin.version)
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _probes(installed: Installed) -> Iterable[Availability]:
    for kind in KINDS:
        for name, entry in sorted(installed.entries[kind].items()):
            if not (getattr(entry.spec, "probe", "") or entry.spec.runtime):
                continue
            probe = installed.probe(entry.spec)
            yield Availability(
                kind=kind,
                name=name,
                distribution=entry.plugin.distribution,
                available=probe.available,
                count=probe.count,
                reason=probe.reason,
                details=dict(probe.details),
            )


def _failures(installed: Installed) -> Iterable[Finding]:
    for failure in installed.failures:
        yield Finding(
            level="error",
            subject=f"plugin {failure.plugin.name}",
            message=f"{failure.plugin} could not be registered: {failure.reason}",
            remedy=f"mend, upgrade or uninstall {failure.plugin.distribution};"
            f" or export TORCHPORT_DISABLE_PLUGINS={failure.plugin.name}",
        )


def _clashes(installed: Installed) -> Iterable[Finding]:
    for (kind, name), plugins in sorted(installed.clashes.items()):
        owner = next((plugin for plugin in plugins if plugin.distribution == CORE), None)
        used = f"that of {owner} is used" if owner else "none of them is used"
        yield Finding(
            level="error",
            subject=f"{kind} {name}",
            message=f"offered by {' and by '.join(map(str, plugins))}; {used}",
            remedy="uninstall one of them, or switch it off with TORCHPORT_DISABLE_PLUGINS",
        )


def _faulty_probes(installed: Installed) -> Iterable[Finding]:
    for kind, name in sorted(installed.faulty_probes):
        entry = installed.entries[kind][name]
        yield Finding(
            level="warning",
            subject=f"{kind} {name}",
            message=installed.probe(entry.spec).reason,
            remedy=f"tell the authors of {entry.plugin}: a probe gives a reason, and never raises",
        )


def _warnings(installed: Installed) -> Iterable[Finding]:
    for sentence in installed.warnings:
        yield Finding(level="warning", subject="plugin lists", message=sentence)


def _backends(installed: Installed) -> Iterable[Finding]:
    """Say beforehand that automatic selection would find no backend, or two equals."""
    available = [spec for spec in installed.specs("backend") if installed.probe(spec).available]
    if not available:
        yield Finding(
            level="error",
            subject="backends",
            message="no installed backend is available on this machine",
            remedy="pip install torchport (which brings the cpu backend)",
        )
        return
    top = max(spec.priority for spec in available)
    best = [spec.name for spec in available if spec.priority == top]
    if len(best) > 1:
        yield Finding(
            level="warning",
            subject="backends",
            message=f"{' and '.join(best)} are available and equally good (priority {top}):"
            " automatic selection will refuse to guess",
            remedy=f"export TORCHPORT_BACKEND={best[0]}",
        )
