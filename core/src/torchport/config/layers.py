"""The layers in which a launch is configured, and how they are put on top of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torchport import aliases, envvars
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.errors import ConfigurationError
from torchport.plugin.specs import Record

_SETTINGS = {item.name: item for item in schema.settings_of(LaunchConfig)}


@dataclasses.dataclass(slots=True)
class Layer:
    """Settings of a launch from one source: the command line, the environment or a file.

    Attributes:
        values: By field of `LaunchConfig`, as far as the source says anything.
        origins: For each, how the user spelled it, for messages.
        variables: Environment variables for each worker that the source sets directly.
        sections: Settings of plugins, by YAML section, not yet checked.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)

    def put(self, name: str, value: Any, origin: str) -> None:
        """Add a setting, converted to the field's type.

        Raises:
            ConfigurationError: if the value does not convert, or another spelling has said something else.
        """
        converted = _SETTINGS[name].coerce(value, origin)
        if converted is None:
            return
        if name in self.values and self.values[name] != converted:
            raise ConfigurationError(
                f"{self.origins[name]} says {name}={schema.as_text(self.values[name])},"
                f" and {origin} says {name}={schema.as_text(converted)}",
                hint="leave out one of them",
            )
        self.values[name] = converted
        self.origins[name] = origin

    def fill(self, slots: Mapping[str, Any], origin: str) -> None:
        """Add the settings that one spelling stands for."""
        for name, value in slots.items():
            self.put(name, value, origin)


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Resolved(Record):
    """A launch, configured.

    Attributes:
        config: The settings that won.
        origins: Where each setting that is not a default came from.
        environ: The environment of a worker: what was given, and the settings that travel as variables.
        overrides: One sentence for each variable that a flag overrides.
        sections: Settings of plugins from the file, by YAML section, not yet checked.
    """

    config: LaunchConfig
    origins: dict[str, str]
    environ: dict[str, str]
    overrides: tuple[str, ...] = ()
    sections: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config_file(self) -> str:
        """Name of the file, for messages."""
        return self.config.config_file or "configuration file"


def resolve(flags: Layer, environ: Mapping[str, str]) -> Resolved:
    """Put the command line on top of the environment, and that on top of the file.

    Args:
        flags: What the command line says.
        environ: The environment of the launching process.

    Raises:
        ConfigurationError: for an unknown key, a value that does not convert, or spellings that disagree.
    """
    environ = aliases.translate_environment(environ)
    variables = schema.from_environment(LaunchConfig, environ)
    path = flags.values.get("config_file") or variables.get("config_file")
    file = Layer()
    if path:
        from torchport.config.file import read_layer  # imports PyYAML

        file = read_layer(path)

    values = file.values | variables | flags.values
    known = envvars.origins(environ)
    from_variables = {name: known.get(_SETTINGS[name].env, _SETTINGS[name].env) for name in variables}
    exported, origins, overrides = {**file.variables, **environ}, dict(known), []
    if environ.get(envvars.CONFIG_FILE):
        origins[envvars.CONFIG_FILE] = "read by the launcher"
    for layer in (file, flags):
        for name, value in layer.values.items():
            variable = envvars.THREADS if name == "num_cpu_threads_per_process" else _SETTINGS[name].env
            if not variable or name == "config_file" or (layer is file and environ.get(variable)):
                continue
            text = schema.as_text(value)
            if (
                layer is flags
                and environ.get(variable)
                and variables.get(name, environ[variable]) not in (value, text)
            ):
                was = origins.get(variable, variable)
                overrides.append(f"{layer.origins[name]} ({name}={text}) overrides {was}={environ[variable]}")
            exported[variable], origins[variable] = text, layer.origins[name]
    if origins:
        exported[envvars.ORIGINS] = envvars.format_origins(origins)
    return Resolved(
        config=LaunchConfig(**values),
        origins=file.origins | from_variables | flags.origins,
        environ=exported,
        overrides=tuple(overrides),
        sections=file.sections,
    )


def check_inert(inert: aliases.Inert, value: Any, where: str) -> bool:
    """Say whether a documented key or flag asks for nothing; if not, a plugin has to read it.

    Raises:
        ConfigurationError: if it asks for something that no plugin reads: nothing that was asked for is ignored.
    """
    text = "" if value in (None, [], {}) else str(value).strip().lower()
    if not text or text in inert.accepted:
        return True
    if inert.instead:
        raise ConfigurationError(f"{where}: {value!r} is not supported", hint=inert.instead)
    return False
