"""Reading the YAML file of a launch, with its documented older keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from torchport import aliases
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Layer, check_inert
from torchport.errors import ConfigurationError


class _Loader(yaml.SafeLoader):
    """Reads `yes`, `no`, `on` and `off` as the words they are (YAML 1.2): `mixed_precision: no` names one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file that holds one mapping; an empty file holds an empty one.

    Raises:
        ConfigurationError: if the file cannot be read, is not YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the configuration file {path!r} cannot be read", reason=str(error)
        ) from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the configuration file {path!r} is not YAML", reason=str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"the configuration file {path!r} must hold keys and values",
            found=f"a {type(content).__name__}",
            hint="lines such as: num_processes: 2",
        )
    return {str(key): value for key, value in content.items()}


def read_layer(path: str) -> Layer:
    """Read the settings of a launch from a file.

    Keys that neither `LaunchConfig` nor the tables of older spellings know are kept in `sections`: an
    installed plugin may read them.

    Raises:
        ConfigurationError: if the file cannot be read, or a value is not allowed.
    """
    layer = Layer()
    known = {item.yaml: item.name for item in schema.settings_of(LaunchConfig) if item.yaml}
    content = read_yaml(path)
    for key, value in content.items():
        _read_key(layer, known, key, value, f"{path}: {key}")
    kind = str(content.get("distributed_type") or "")
    if kind.upper() == aliases.ONE_PROCESS and "num_processes" not in layer.values:
        layer.put("num_processes", 1, f"{path}: distributed_type")
    if kind.upper() in aliases.TENSOR_PARALLEL:
        _check_tensor_parallel(layer, kind, path)
    return layer


def _check_tensor_parallel(layer: Layer, kind: str, path: str) -> None:
    """Refuse a label that asks for tensor parallelism where the file does not say over how many processes."""
    from torchport.plugin.parallelism import ParallelismConfig

    size = next(item for item in schema.settings_of(ParallelismConfig) if item.name == "tp_size")
    section = layer.sections.get(schema.section_of(ParallelismConfig))
    if isinstance(section, Mapping) and any(section.get(key) not in (None, 1, "1") for key in size.keys):
        return
    raise ConfigurationError(
        f"{path}: distributed_type: {kind} does not say how many processes share each layer",
        hint=f"in its place `strategy: {aliases.MESH_PLUGIN}` and"
        f" `{schema.section_of(ParallelismConfig)}: {{{size.yaml}: N}}` (--{size.flag} N)",
    )


def _read_key(layer: Layer, known: Mapping[str, str], key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if key in known:
        layer.put(known[key], value, where)
    elif key in aliases.YAML_KEYS:
        layer.put(aliases.YAML_KEYS[key], value, where)
    elif key in aliases.YAML_SWITCHES:
        if str(value).strip().lower() in ("1", "true", "yes", "on"):
            layer.fill(aliases.YAML_SWITCHES[key], where)
    elif key in aliases.YAML_SECTIONS:
        layer.sections.setdefault(aliases.YAML_SECTIONS[key], {})[key] = value
    elif key == "distributed_type":
        layer.fill(_label(aliases.DISTRIBUTED_TYPE_SLOTS, value, where), where)
    elif key == "compute_environment":
        layer.fill(_label(aliases.COMPUTE_ENVIRONMENTS, value, where), where)
    elif key in aliases.INERT_KEYS:
        if not check_inert(aliases.INERT_KEYS[key], value, where):
            layer.sections[key] = value
    elif key in aliases.YAML_VARIABLES:
        layer.variables[aliases.YAML_VARIABLES[key]] = str(value)
    elif key in aliases.LAUNCHER_SECTIONS and isinstance(value, dict):
        for inner, setting in value.items():
            _read_key(layer, known, str(inner), setting, f"{where}: {inner}")
        if value:
            layer.put("launcher", aliases.LAUNCHER_SECTIONS[key], where)
    elif key in aliases.YAML_SECTIONS.values() and isinstance(value, dict):
        layer.sections[key] = {**layer.sections.get(key, {}), **value}
    else:
        layer.sections[key] = value


def _label(table: Mapping[str, Mapping[str, str]], value: Any, where: str) -> Mapping[str, str]:
    slots = table.get(str(value).strip().upper())
    if slots is None:
        near = schema.suggest(str(value).upper(), table)
        raise ConfigurationError(
            f"{where}: {value!r} is not known", hint=near or f"one of {', '.join(table)}"
        )
    return slots
