"""Find the installed plugins and register each in isolation.

A plugin that raises, misspells a hook or returns a bad descriptor is unregistered whole and kept as a
`PluginFailure`: it neither takes the program down nor vanishes silently.
"""

from __future__ import annotations

import importlib.metadata
import traceback
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import pluggy

from torchport import builtin, envvars
from torchport.errors import InvalidSpecError, PluginError
from torchport.plan.registry import CORE, Entry, Installed, Plugin, PluginFailure, missing_runtime
from torchport.plugin import hookspecs
from torchport.plugin.specs import KINDS, Finding, Kind


def discover(
    environ: Mapping[str, str], *, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None
) -> Installed:
    """Register the core's own plugins and those that installed distributions announce.

    Args:
        environ: Read for `TORCHPORT_PLUGINS` and `TORCHPORT_DISABLE_PLUGINS`.
        entry_points: The announcements to consider; by default those of all installed distributions.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    installed = Installed()
    version = _core_version()
    _register(manager, builtin, Plugin("core", CORE, version), installed)

    found = sorted(
        importlib.metadata.entry_points(group=hookspecs.PROJECT) if entry_points is None else entry_points,
        key=lambda point: (point.name, point.dist.name if point.dist else ""),
    )
    for point in _allowed(found, environ, installed):
        plugin = Plugin(
            point.name, point.dist.name if point.dist else point.module, point.dist.version if point.dist else ""
        )
        problem = _core_requirement(point)
        if problem:
            installed.failures.append(PluginFailure(plugin, problem))
            continue
        try:
            module = point.load()
        except (Exception, SystemExit) as error:
            installed.failures.append(
                PluginFailure(plugin, f"import failed: {type(error).__name__}: {error}", traceback.format_exc())
            )
            continue
        _register(manager, module, plugin, installed)
    return installed


def _allowed(
    points: list[importlib.metadata.EntryPoint], environ: Mapping[str, str], installed: Installed
) -> Iterable[importlib.metadata.EntryPoint]:
    """Apply the allow-list and the deny-list, and warn of names in them that nothing answers to."""
    allow = envvars.names(environ, envvars.PLUGINS)
    deny = envvars.names(environ, envvars.DISABLE_PLUGINS) or ()
    present = {point.name for point in points}
    for variable, listed in ((envvars.PLUGINS, allow or ()), (envvars.DISABLE_PLUGINS, deny)):
        for name in listed:
            if name not in present:
                installed.warnings.append(
                    f"{variable} names {name!r}, but no such plugin is installed"
                    f" (installed: {', '.join(sorted(present)) or 'none'})"
                )
    for point in points:
        if point.name in deny:
            installed.denied[point.name] = f"it is listed in {envvars.DISABLE_PLUGINS}"
        elif allow is not None and point.name not in allow:
            installed.denied[point.name] = f"it is not listed in {envvars.PLUGINS}"
        else:
            yield point


def _core_version() -> str:
    try:
        return importlib.metadata.version(CORE)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return ""


def _core_requirement(point: importlib.metadata.EntryPoint) -> str:
    """Check the distribution's required range of the core, before anything of it is imported."""
    wanted = [r for r in (point.dist.requires if point.dist else None) or () if r.startswith(CORE)]
    problem = missing_runtime(wanted) if wanted and _core_version() else ""
    return f"it {problem}" if problem else ""


def _register(manager: pluggy.PluginManager, module: Any, plugin: Plugin, installed: Installed) -> None:
    """Register one plugin and collect what it offers; on any fault, take it out whole."""
    others = [other for other in manager.get_plugins() if other is not module]
    label = f"{plugin.distribution}:{plugin.name}"
    try:
        if not isinstance(module, ModuleType) and not hasattr(module, "__class__"):
            raise PluginError(f"the entry point refers to {module!r}, which is not a module or an object")
        manager.register(module, label)
        _refuse_unknown_hooks(manager, module)
        entries = [entry for kind in KINDS.values() for entry in _collect(manager, kind, plugin, others)]
    except Exception as error:
        if manager.has_plugin(label):
            manager.unregister(name=label)
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        installed.failures.append(PluginFailure(plugin, reason, traceback.format_exc()))
        return
    installed.add(entries)
    installed.plugins.append(plugin)
    callers = {caller.name for caller in manager.get_hookcallers(module) or ()}
    if "torchport_plan_resolved" in callers:
        hook = manager.subset_hook_caller("torchport_plan_resolved", others)
        installed.observers.append(lambda plan: hook(plan=plan) and None)
    if "torchport_findings" in callers:
        report = manager.subset_hook_caller("torchport_findings", others)
        installed.findings.append(lambda: _findings(report(), plugin))


def _refuse_unknown_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    """Refuse hook implementations that no specification knows: nearly always a misspelling."""
    import difflib

    known = [name for name in vars(hookspecs) if name.startswith("torchport_")]
    for caller in manager.get_hookcallers(module) or ():
        if not caller.has_spec():
            near = difflib.get_close_matches(caller.name, known, n=1, cutoff=0.6)
            raise PluginError(
                f"there is no hook {caller.name!r}", hint=f"did you mean {near[0]!r}?" if near else ""
            )
    for name in vars(module) if isinstance(module, ModuleType) else ():
        implemented = getattr(vars(module)[name], "torchport_impl", None)
        if implemented is None and name in known and callable(vars(module)[name]):
            raise PluginError(
                f"{name} is not marked as a hook implementation", hint="put @hookimpl above its definition"
            )


def _collect(manager: pluggy.PluginManager, kind: Kind, plugin: Plugin, others: list[Any]) -> Iterable[Entry]:
    """Call one plugin's hook of one kind and check what it returns."""
    for returned in manager.subset_hook_caller(kind.hook, others)():
        for spec in _iterate(returned, kind.hook):
            if not isinstance(spec, kind.spec):
                raise InvalidSpecError(
                    f"{kind.hook} must give {kind.spec.__name__} objects",
                    found=repr(spec),
                )
            yield Entry(spec, plugin)


def _iterate(returned: Any, hook: str) -> list[Any]:
    try:
        return list(returned)
    except TypeError as error:
        if not hasattr(returned, "__iter__"):
            raise InvalidSpecError(
                f"{hook} must return an iterable", found=repr(returned), hint="yield the spec, or return [spec]"
            ) from error
        raise


def _findings(answers: Iterable[Iterable[Finding]], plugin: Plugin) -> Iterable[Finding]:
    """Collect one plugin's findings; a report that raises becomes a finding itself."""
    try:
        return [finding for answer in answers for finding in answer]
    except Exception as error:
        return [Finding(level="error", subject=plugin.name, message=f"its findings raised {error!r}")]
