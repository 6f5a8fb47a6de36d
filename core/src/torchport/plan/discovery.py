"""Find the installed plugins and register each in isolation.

A plugin that raises, misspells a hook or returns a bad descriptor is unregistered whole and kept as a
`PluginFailure`: it neither takes the program down nor vanishes silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from torchport import builtin, envvars
from torchport.errors import InvalidSpecError, PluginError, TorchportError
from torchport.plan import registered as by_script
from torchport.plan.misspelt import misspelt
from torchport.plan.registry import (
    CORE,
    Entry,
    Installed,
    Plugin,
    PluginFailure,
    load_reference,
    plugin_key,
)
from torchport.plugin import hookspecs
from torchport.plugin.distributions import Announcement, announcements, version_of
from torchport.plugin.installation import missing_runtime
from torchport.plugin.requirements import name_of, plainly_met
from torchport.plugin.specs import KINDS, Finding, Kind

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_MARK = f"{hookspecs.PROJECT}_impl"
_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("torchport_"))


def discover(environ: Mapping[str, str], *, entry_points: Iterable[EntryPoint] | None = None) -> Installed:
    """Register the core's own plugins and those that installed distributions announce.

    Args:
        environ: Read for `TORCHPORT_PLUGINS` and `TORCHPORT_DISABLE_PLUGINS`.
        entry_points: The announcements to consider; by default those of all installed distributions.
    """
    if entry_points is None:
        announced: Iterable[Announcement] = announcements(hookspecs.PROJECT)
    else:
        announced = map(Announcement.of, entry_points)
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    installed = Installed()
    core_version = version_of(CORE) or ""  # not installed: run from a source tree
    registered: list[tuple[Any, Plugin]] = []
    entries: list[Entry] = []

    own = Plugin("core", CORE, core_version)
    if _register(manager, builtin, own, entries, installed):
        registered.append((builtin, own))
    for one in _allowed(announced, environ, installed):
        plugin = Plugin(one.name, one.distribution, one.version)
        module = _import(one, plugin, core_version, installed)
        if module is not None and _register(manager, module, plugin, entries, installed):
            registered.append((module, plugin))

    installed.add([*entries, *by_script.entries()])
    for module, plugin in registered:
        _listen(manager, module, plugin, [other for other, _ in registered if other is not module], installed)
    installed.warnings += misspelt(environ, installed)
    return installed


class _Manager(pluggy.PluginManager):
    """Looks at what is marked as a hook only; pluggy would examine each name of a module for half a millisecond."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, ModuleType) and not hasattr(vars(plugin).get(name), _MARK):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def _allowed(
    announced: Iterable[Announcement], environ: Mapping[str, str], installed: Installed
) -> Iterable[Announcement]:
    """Apply the allow-list and the deny-list, and warn of names in them that nothing answers to."""
    ordered = sorted(announced, key=lambda one: (one.name, one.distribution))
    present = {plugin_key(one.name) for one in ordered}
    listed = {name: envvars.names(environ, name) for name in (envvars.PLUGINS, envvars.DISABLE_PLUGINS)}
    for variable, names in listed.items():
        for name in names or ():
            if plugin_key(name) not in present:
                installed.warnings.append(
                    f"{variable} names {name!r}, but no such plugin is installed"
                    f" (installed: {', '.join(sorted(present)) or 'none'})"
                )
    allow, deny = ({plugin_key(name) for name in names or ()} for names in listed.values())
    for one in ordered:
        name = one.name
        if plugin_key(name) in deny:
            installed.denied[name] = f"it is listed in {envvars.DISABLE_PLUGINS}"
        elif listed[envvars.PLUGINS] is not None and plugin_key(name) not in allow:
            installed.denied[name] = f"it is not listed in {envvars.PLUGINS}"
        else:
            yield one


def _import(announced: Announcement, plugin: Plugin, core_version: str, installed: Installed) -> Any:
    """Import what an entry point names, unless its distribution is made for another core."""
    problem = _core_requirement(announced, core_version) if core_version else ""
    if problem:
        installed.failures.append(PluginFailure(plugin, problem))
        return None
    try:
        return load_reference(announced.reference)
    except (Exception, SystemExit) as error:
        reason = f"import failed: {type(error).__name__}: {error}"
        installed.failures.append(PluginFailure(plugin, reason, _traceback()))
        return None


def _traceback() -> str:
    import traceback

    return traceback.format_exc()


def _core_requirement(announced: Announcement, core_version: str) -> str:
    """Check the distribution's required range of the core, before anything of it is imported."""
    own = [text for text in announced.requires if name_of(text) == CORE]
    wanted = [text for text in own if not plainly_met(text, core_version)]
    try:
        problem = missing_runtime(wanted)
    except ValueError as error:
        return f"its metadata is not valid: {error}"
    return f"it {problem}" if problem else ""


def _register(
    manager: pluggy.PluginManager, module: Any, plugin: Plugin, entries: list[Entry], installed: Installed
) -> bool:
    """Register one plugin and add what it offers to `entries`; on any fault, take it out whole."""
    others = [other for other in manager.get_plugins() if other is not module]
    label = f"{plugin.distribution}:{plugin.name}"
    try:
        manager.register(module, label)
        _refuse_unknown_hooks(manager, module)
        offered = [entry for kind in KINDS.values() for entry in _collect(manager, kind, plugin, others)]
        _refuse_repeated_names(offered)
    except (Exception, SystemExit) as error:
        if manager.has_plugin(label):
            manager.unregister(name=label)
        reason = str(error) if isinstance(error, TorchportError) else f"{type(error).__name__}: {error}"
        installed.failures.append(PluginFailure(plugin, reason, _traceback()))
        return False
    entries += offered
    installed.plugins.append(plugin)
    return True


def _refuse_unknown_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    """Refuse implementations of hooks that do not exist (nearly always misspelt), and unmarked ones."""
    implemented = {caller.name: caller for caller in manager.get_hookcallers(module) or ()}
    for name, caller in implemented.items():
        if not caller.has_spec():
            import difflib

            near = difflib.get_close_matches(name, _HOOKS, n=1, cutoff=0.6)
            raise PluginError(f"there is no hook {name!r}", hint=f"did you mean {near[0]!r}?" if near else "")
    if isinstance(module, ModuleType):
        for name in sorted(_HOOKS & vars(module).keys() - implemented.keys()):
            if callable(getattr(module, name)):
                raise PluginError(
                    f"{name} is not marked as a hook implementation",
                    hint="put @hookimpl above its definition",
                )


def _collect(manager: pluggy.PluginManager, kind: Kind, plugin: Plugin, others: list[Any]) -> Iterable[Entry]:
    """Call one plugin's hook of one kind and check what it returns."""
    for returned in manager.subset_hook_caller(kind.hook, others)():
        if not isinstance(returned, Iterable):
            raise InvalidSpecError(
                f"{kind.hook} must return an iterable",
                found=repr(returned),
                hint="yield the spec, or return [spec]",
            )
        for spec in returned:
            if not isinstance(spec, kind.spec):
                raise InvalidSpecError(
                    f"{kind.hook} must give {kind.spec.__name__} objects", found=repr(spec)
                )
            yield Entry(spec, plugin)


def _refuse_repeated_names(entries: Iterable[Entry]) -> None:
    seen = set()
    for entry in entries:
        for label in entry.labels:
            if (entry.spec.kind, label) in seen:
                raise InvalidSpecError(f"the plugin offers the {entry.spec.kind} {label!r} twice")
            seen.add((entry.spec.kind, label))


def _listen(
    manager: pluggy.PluginManager, module: Any, plugin: Plugin, others: list[Any], installed: Installed
) -> None:
    """Keep calls of one plugin's observing hooks alone, so that a fault can be put down to it."""
    implemented = {caller.name for caller in manager.get_hookcallers(module) or ()}
    if "torchport_plan_resolved" in implemented:
        hook = manager.subset_hook_caller("torchport_plan_resolved", others)
        installed.observers.append(_observer(hook, plugin))
    if "torchport_findings" in implemented:
        report = manager.subset_hook_caller("torchport_findings", others)
        installed.findings.append(lambda: _findings(report, plugin))


def _observer(hook: Callable[..., Any], plugin: Plugin) -> Callable[[Any], tuple[str, ...]]:
    def observe(plan: Any) -> tuple[str, ...]:
        try:
            said = tuple(sentence for answer in hook(plan=plan) for sentence in _sentences(answer))
        except TorchportError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {plugin.name!r} ({plugin}) failed when it was shown the plan",
                reason=f"{type(error).__name__}: {error}",
                hint=f"export TORCHPORT_DISABLE_PLUGINS={plugin.name}",
            ) from error
        return said

    return observe


def _sentences(answer: Any) -> tuple[str, ...]:
    """Check what a plugin returned when it was shown the plan."""
    said = (answer,) if isinstance(answer, str) else tuple(answer or ())
    wrong = next((sentence for sentence in said if not isinstance(sentence, str)), None)
    if wrong is not None:
        raise TypeError(f"torchport_plan_resolved must return texts, not {wrong!r}")
    return said


def _findings(report: Callable[[], Iterable[Iterable[Finding]]], plugin: Plugin) -> list[Finding]:
    """Collect one plugin's findings; a report that raises becomes a finding itself."""
    try:
        found = [finding for answer in report() for finding in answer]
        wrong = next((finding for finding in found if not isinstance(finding, Finding)), None)
        if wrong is not None:
            raise TypeError(f"torchport_findings must give Finding objects, not {wrong!r}")
    except Exception as error:
        message = f"its findings raised {type(error).__name__}: {error}"
        return [Finding(level="error", subject=plugin.name, message=message)]
    return found
