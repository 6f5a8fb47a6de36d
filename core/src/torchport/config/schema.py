"""A dataclass field that knows its flag, YAML key, environment variable, help and constraints.

Each configurable thing is one dataclass whose fields are made by `setting`. A class attribute
`__torchport_prefix__ = "acme"` gives derived names: the field `offload_params` then has the flag
`--acme-offload-params`, the key `acme_offload_params` in the YAML section `acme_config`, and the variable
`ACME_OFFLOAD_PARAMS`. Without a prefix, flag and key are the field's name and there is no variable.
`__torchport_section__` names another section.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from torchport.errors import ConfigurationError

_METADATA = "torchport"
_TRUE, _FALSE = (
    frozenset({"1", "true", "yes", "on", "y", "t"}),
    frozenset({"0", "false", "no", "off", "n", "f"}),
)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    default_factory: Any = dataclasses.MISSING,
    choices: Iterable[str] = (),
    flag: str | None = None,
    short: str = "",
    yaml: str | None = None,
    env: str | None = None,
    aliases: Iterable[str] = (),
) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: Default value.
        help: One sentence for `--help` and the reference page.
        default_factory: Makes the default value, where it is mutable.
        choices: The values allowed, where they are few.
        flag: Name of the command-line flag without dashes; `""` for none; `None` derives it.
        short: One-letter flag.
        yaml: Key in YAML files; `""` for none; `None` derives it.
        env: Environment variable; `""` for none; `None` derives it (with a prefix) or means none.
        aliases: Older names of flag and key, with `_`.
    """
    metadata = {
        _METADATA: {
            "help": help, "choices": tuple(choices), "flag": flag, "short": short, "yaml": yaml, "env": env,
            "aliases": tuple(aliases),
        }
    }  # fmt: skip
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Setting(typing.NamedTuple):
    """A resolved field of a configuration dataclass; an empty name means it cannot be set that way."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    flag: str
    short: str
    yaml: str
    env: str
    aliases: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """The names of its flag, without dashes; the first is the one to show."""
        return (self.flag, *(name.replace("_", "-") for name in self.aliases)) if self.flag else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its YAML key; the first is the one to show."""
        return (self.yaml, *self.aliases) if self.yaml else ()

    @property
    def is_flag(self) -> bool:
        """Whether it is true or false."""
        return bool in _members(self.type)

    def coerce(self, value: Any, where: str) -> Any:
        """Convert `value` (a text, or what YAML made of one) to the field's type.

        Raises:
            ConfigurationError: naming `where` it was set, if it does not convert or is not a choice.
        """
        if value is None:
            return None
        converted = _convert(value, self.type)
        if converted is dataclasses.MISSING:
            raise ConfigurationError(
                f"{where} must be {_describe(self.type)}", found=repr(value), hint=self.help
            )
        label = converted.value if isinstance(converted, enum.Enum) else converted
        if self.choices and label is not None and str(label).lower() not in {c.lower() for c in self.choices}:
            raise ConfigurationError(
                f"{where} must be one of {', '.join(self.choices)}",
                found=repr(value),
                hint=suggest(str(value), self.choices),
            )
        return converted


@functools.cache
def settings_of(config: type) -> tuple[Setting, ...]:
    """Return the settings of a dataclass, in order; fields not made by `setting` are left out."""
    prefix = getattr(config, "__torchport_prefix__", "")
    hints = typing.get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        metadata = field.metadata.get(_METADATA)
        if metadata is None:
            continue
        stem = f"{prefix}_{field.name}" if prefix else field.name
        flag, yaml, env = metadata["flag"], metadata["yaml"], metadata["env"]
        found.append(
            Setting(
                name=field.name,
                type=hints[field.name],
                default=_default(field),
                help=metadata["help"],
                choices=metadata["choices"],
                flag=(stem if flag is None else flag).replace("_", "-"),
                short=metadata["short"],
                yaml=stem if yaml is None else yaml,
                env=(stem.upper() if prefix else "") if env is None else env,
                aliases=metadata["aliases"],
            )
        )
    return tuple(found)


def section_of(config: type) -> str:
    """Return the YAML section that holds a plugin's settings; empty for settings at the top of the file."""
    prefix = getattr(config, "__torchport_prefix__", "")
    section: str = getattr(config, "__torchport_section__", f"{prefix}_config" if prefix else "")
    return section


def from_mapping(config: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read settings from the keys of a YAML section.

    Raises:
        ConfigurationError: for an unknown key (with the nearest known one) or a value of the wrong type.
    """
    known = {key: item for item in settings_of(config) for key in item.keys}
    read: dict[str, Any] = {}
    for key, value in values.items():
        item = known.get(key)
        if item is None:
            raise ConfigurationError(
                f"{where}: unknown key {key!r}",
                hint=suggest(key, known) or f"one of {', '.join(sorted(known))}",
            )
        converted = item.coerce(value, f"{where}: {key}")
        if read.get(item.name, converted) != converted:
            raise ConfigurationError(
                f"{where}: {' and '.join(key for key in values if known.get(key) is item)} are one setting",
                found="different values",
                hint="leave out one of them",
            )
        read[item.name] = converted
    return read


def from_environment(config: type, environ: Mapping[str, str]) -> dict[str, Any]:
    """Read settings from their environment variables; unset and empty ones are left out."""
    return {
        item.name: item.coerce(environ[item.env], f"environment variable {item.env}")
        for item in settings_of(config)
        if item.env and environ.get(item.env)
    }


def to_environment(config: type, values: Mapping[str, Any]) -> dict[str, str]:
    """Write settings to environment variables, so that `from_environment` reads the same values."""
    return {
        item.env: as_text(values[item.name])
        for item in settings_of(config)
        if item.env and values.get(item.name) is not None
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union type, or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _convert(value: Any, kind: Any) -> Any:
    """Convert to the first member type that takes the value; `MISSING` if none does."""
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and type(None) in _members(kind):
        return None
    for member in _members(kind):
        if member is Any:
            return value
        converted = _convert_one(value, member)
        if converted is not dataclasses.MISSING:
            return converted
    return dataclasses.MISSING


def _convert_one(value: Any, kind: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    if kind is bool:
        if isinstance(value, bool):
            return value
        lowered = str(text).lower()
        return True if lowered in _TRUE else False if lowered in _FALSE else dataclasses.MISSING
    if kind in (int, float):
        if isinstance(value, bool):
            return dataclasses.MISSING
        try:
            return kind(text) if isinstance(text, (str, int)) or kind is float else dataclasses.MISSING
        except (TypeError, ValueError):
            return dataclasses.MISSING
    if kind is str:
        return (
            value
            if isinstance(value, str)
            else str(value)
            if isinstance(value, (int, float))
            else dataclasses.MISSING
        )
    if typing.get_origin(kind) in (tuple, list):
        return _convert_sequence(text, kind)
    if typing.get_origin(kind) is dict:
        return _convert_mapping(text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        for member in kind:
            if str(text).lower() in (str(member.value).lower(), member.name.lower()):
                return member
        try:
            return kind(text)  # a number that the class takes for one of its members
        except ValueError:
            return dataclasses.MISSING
    return value if isinstance(kind, type) and isinstance(value, kind) else dataclasses.MISSING


def _convert_sequence(value: Any, kind: Any) -> Any:
    """Convert a list, or a text with commas (in brackets or not), and each of its items."""
    items = value.strip("()[]").split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return dataclasses.MISSING
    items = [item for item in items if str(item).strip()]
    kinds = [one for one in typing.get_args(kind) if one is not Ellipsis]
    if len(kinds) == 1:
        kinds *= len(items)
    if len(kinds) != len(items):
        return dataclasses.MISSING
    converted = [
        str(item).strip() if one is str else _convert(item, one)
        for item, one in zip(items, kinds, strict=True)
    ]
    origin: Any = typing.get_origin(kind)
    return dataclasses.MISSING if dataclasses.MISSING in converted else origin(converted)


def as_text(value: Any) -> str:
    """Write a value as flags and variables hold it; `Setting.coerce` reads it back."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        import json

        return json.dumps(value)
    return str(value.value if isinstance(value, enum.Enum) else value)


def _convert_mapping(value: Any) -> Any:
    """Take a mapping as it is, and a text as JSON."""
    if isinstance(value, str):
        import json

        try:
            value = json.loads(value)
        except ValueError:
            return dataclasses.MISSING
    return dict(value) if isinstance(value, Mapping) else dataclasses.MISSING


def _describe(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "none",
    }
    described = []
    for member in _members(kind):
        if typing.get_origin(member) in (tuple, list):
            items = [one for one in typing.get_args(member) if one is not Ellipsis]
            count = f"{len(items)} values" if len(items) > 1 else "values"
            described.append(f"{count} with commas, each {_describe(items[0])}")
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            described.append(f"one of {', '.join(str(choice.value) for choice in member)}")
        else:
            described.append(names.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(described)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean …?` with the nearest known name; empty if none is near."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""
