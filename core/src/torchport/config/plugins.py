"""Settings beside those of a launch, the core's and plugins': flags, sections of the file, variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torchport import aliases, envvars
from torchport.config import schema
from torchport.config.dynamo import TorchDynamoPlugin
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Resolved
from torchport.config.schema import Setting
from torchport.errors import ConfigurationError
from torchport.plan.registry import Installed, load_reference
from torchport.plugin.parallelism import ParallelismConfig
from torchport.plugin.specs import KINDS, Spec


@dataclasses.dataclass(frozen=True, slots=True)
class PluginSettings:
    """The settings of one installed plugin, or of a part of the core.

    Attributes:
        spec: The plugin's descriptor; `None` for the core.
        config: Its configuration dataclass.
        part: Name of the part of the core.
    """

    spec: Spec | None
    config: type
    part: str = ""

    @property
    def title(self) -> str:
        """What the settings are of."""
        return f"the {self.spec.kind} {self.spec.name}" if self.spec is not None else self.part

    @property
    def section(self) -> str:
        """The section of the file that holds them; empty for the top of the file."""
        return schema.section_of(self.config)

    @property
    def by_flag(self) -> dict[str, Setting]:
        """Its settings by flag."""
        return {
            flag: item
            for item in schema.settings_of(self.config)
            if self.reaches(item)
            for flag in item.flags
        }

    @property
    def by_key(self) -> dict[str, Setting]:
        """Its settings by YAML key."""
        return {key: item for item in schema.settings_of(self.config) for key in item.keys}

    def reaches(self, item: Setting) -> bool:
        """Whether a setting can get from the launch to its reader: by a variable, or the launch reads it."""
        return bool(item.env) or (self.spec is not None and self.spec.kind == "launcher")


CORE_SETTINGS = (
    PluginSettings(None, TorchDynamoPlugin, "torch.compile"),
    PluginSettings(None, ParallelismConfig, "parallelism"),
)
"""Settings of the core that travel to the workers as those of plugins do."""


def plugin_settings(installed: Installed) -> tuple[list[PluginSettings], dict[str, str]]:
    """Import the configuration dataclasses of the installed plugins.

    Returns:
        The settings of the core and of each plugin, and why those of some could not be read, by plugin.
    """
    found: dict[str, PluginSettings] = {}
    broken = {}
    for kind in KINDS:
        for spec in installed.specs(kind):
            if not spec.config or spec.config in found:
                continue
            try:
                config = load_reference(spec.config)
                schema.settings_of(config)
            except Exception as error:
                broken[f"{kind} {spec.name!r}"] = f"{type(error).__name__}: {error}"
            else:
                found[spec.config] = PluginSettings(spec, config)
    return [*CORE_SETTINGS, *found.values()], broken


def apply_settings(
    resolved: Resolved,
    flags: Mapping[str, str],
    plugins: Iterable[PluginSettings],
    broken: Mapping[str, str] | None = None,
) -> Resolved:
    """Add the settings of plugins to a launch: a flag comes before a variable, and that before the file.

    Args:
        resolved: The launch so far.
        flags: Values from the command line, by flag.
        plugins: The settings of the installed plugins.
        broken: Why those of some could not be read, by plugin.

    Returns:
        The launch with their variables in its environment and only checked sections.

    Raises:
        ConfigurationError: for a key that no installed plugin reads, or a value that does not convert.
    """
    plugins = list(plugins)
    environ, origins = dict(resolved.environ), envvars.origins(resolved.environ)
    sections: dict[str, dict[str, Any]] = {}
    for key, content in resolved.sections.items():
        if content in (None, {}, [], ""):
            continue
        readers = [p for p in plugins if key == p.section] or [
            p for p in plugins if not p.section and key in p.by_key
        ]
        if not readers:
            raise _unknown_key(key, resolved, plugins, broken or {})
        for plugin in readers:
            values = content if plugin.section else {key: content}
            _put_section(plugin, values, resolved.config_file, environ, origins)
            sections.setdefault(plugin.section, {}).update(values)
    for flag, value in flags.items():
        for plugin in plugins:
            item = plugin.by_flag.get(flag)
            if item is None:
                continue
            converted = item.coerce(value, f"--{flag}")
            if item.env:
                environ[item.env] = schema.as_text(converted)
                origins[item.env] = f"--{flag}"
            if item.yaml:
                sections.setdefault(plugin.section, {})[item.yaml] = converted
    given = {key for content in sections.values() for key, value in content.items() if _reaches_out(value)}
    for key in sorted(given & aliases.MACHINE_LAUNCHERS.keys()):
        environ.setdefault(envvars.LAUNCHER, aliases.MACHINE_LAUNCHERS[key])
        origins.setdefault(envvars.LAUNCHER, key)
    if origins:
        environ[envvars.ORIGINS] = envvars.format_origins(origins)
    return dataclasses.replace(resolved, environ=environ, sections=sections)


def _reaches_out(value: Any) -> bool:
    """Whether a setting about machines asks for the launcher that it belongs to."""
    return value not in (None, "", aliases.STANDARD_LAUNCHER)


def _put_section(
    plugin: PluginSettings, content: Any, file: str, environ: dict[str, str], origins: dict[str, str]
) -> None:
    """Check one section of the file and make variables of it, where no variable says otherwise."""
    where = f"{file}: {plugin.section}" if plugin.section else file
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{where} must hold keys and values", found=repr(content))
    values = schema.from_mapping(plugin.config, content, where)
    for key in content:
        item = plugin.by_key[key]
        if not plugin.reaches(item):
            raise ConfigurationError(
                f"{where}: {key} cannot be set in a file",
                hint=f"give it to {plugin.config.__name__} in the script",
            )
        if item.env and not environ.get(item.env) and values[item.name] is not None:
            environ[item.env] = schema.as_text(values[item.name])
            origins[item.env] = f"{where}: {key}"


def _unknown_key(
    key: str, resolved: Resolved, plugins: Iterable[PluginSettings], broken: Mapping[str, str]
) -> ConfigurationError:
    owner = aliases.plugin_of(key)
    known = [
        *(item.yaml for item in schema.settings_of(LaunchConfig) if item.yaml),
        *(plugin.section for plugin in plugins if plugin.section),
        *aliases.YAML_KEYS,
        *aliases.YAML_SWITCHES,
        *("distributed_type", "compute_environment"),
    ]
    hint = (
        f"pip install torchport-{owner}" if owner else schema.suggest(key, known) or "torchport launch --help"
    )
    reason = f"the plugin {owner!r} reads it, and does not offer it here" if owner else ""
    return ConfigurationError(
        f"{resolved.config_file}: unknown key {key!r}", reason=reason or unreadable(broken), hint=hint
    )


def unreadable(broken: Mapping[str, str]) -> str:
    """Say which plugins' settings could not be read, if any."""
    return "; ".join(f"the settings of {plugin} could not be read: {why}" for plugin, why in broken.items())
