"""The tables of the reference pages, read from the code they describe. `docs/build.py` puts them into the pages."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import scorecards
from torchport import aliases, envvars, plugin
from torchport.cli import cli
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.plugins import PluginSettings, plugin_settings
from torchport.plan.discovery import discover
from torchport.plugin import hookspecs
from torchport.plugin.specs import KINDS, Spec

ROOT = Path(__file__).resolve().parent.parent
INTERFACES = ("Backend", "Collectives", "Precision", "Strategy", "Launcher", "Tracker", "Quantizer")
VALUES = (
    "Probe", "Capabilities", "Requirements", "Topology", "Finding", "Job", "RunContext", "PrepareRequest",
    "Prepared", "ParallelismConfig", "Kind",
)  # fmt: skip
"""Dataclasses of the seam that are not descriptors."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Return text as inline code; a dash for none."""
    return f"`{text}`" if text else "-"


# --- environment.md ------------------------------------------------------------------------------------------


def variables() -> str:
    """The variables that the core reads or sets."""
    return table(("variable", "what it does"), [(code(v.name), v.help) for v in envvars.VARIABLES])


def older_variables() -> str:
    """Documented older variables."""
    rows = [(code(old), code(new)) for old, new in aliases.ENVIRONMENT.items()]
    rows += [
        (code(f"{old}=1"), code(f"{name}={value}"))
        for old, (name, value) in aliases.ENVIRONMENT_SWITCHES.items()
    ]
    return table(("older spelling", "means"), rows)


def launch_settings() -> str:
    """Every setting of a launch, with all its names."""
    return _settings(schema.settings_of(LaunchConfig))


def _settings(settings: Iterable[schema.Setting]) -> str:
    rows = [
        (
            ", ".join([_flags(item), *(code(f"--{name}") for name in item.flags[1:])]),
            ", ".join(map(code, item.keys)) or "-",
            code(item.env),
            _default(item),
            item.help,
        )
        for item in settings
    ]
    return table(("flag", "YAML key", "variable", "default", "what it does"), rows)


def _flags(item: schema.Setting) -> str:
    if not item.flag:
        return "-"
    parameters = {param.name: param for param in _command("launch").params}
    option = parameters.get(item.name)
    if isinstance(option, click.Option) and f"--{item.flag}" in option.opts:
        return _spellings(option)
    return (
        f"{code('--' + item.flag)}, {code('--no-' + item.flag)}" if item.is_flag else code(f"--{item.flag}")
    )


def _default(item: schema.Setting) -> str:
    value = schema.as_text(item.default) if item.default not in (None, "", (), {}) else ""
    return code(value.lower() if item.is_flag else value)


def plugins_settings() -> str:
    """The settings of each plugin of this repository that has any."""
    parts = []
    for found in own_settings():
        parts += [
            f"### {found.spec.kind} `{found.spec.name}`" if found.spec else f"### `{found.part}`",
            f"Class `{found.config.__name__}`, "
            + (f"YAML section `{found.section}`." if found.section else "keys at the top of the YAML file."),
            _settings(schema.settings_of(found.config)),
        ]
    return "\n\n".join(parts)


def own_settings() -> list[PluginSettings]:
    """Return the settings of the core and of the plugins published here, and of no other that is installed."""
    installed = discover({})
    ours = {
        entry.spec.config
        for entries in installed.entries.values()
        for entry in entries.values()
        if entry.plugin.distribution in own_distributions()
    }
    return [found for found in plugin_settings(installed)[0] if not found.spec or found.spec.config in ours]


def own_distributions() -> set[str]:
    """Name the distributions that this repository publishes."""
    files = [ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
    return {re.search(r'^name = "(.+)"$', file.read_text(), re.MULTILINE)[1] for file in files}


def other_commands() -> str:
    """The flags of every command but `launch`."""
    parts = []
    for name in ["", *[name for name in core_commands() if name != "launch"]]:
        command = _command(name) if name else cli
        rows = [
            (_spellings(param), param.help or "") if isinstance(param, click.Option)
            else (code((param.name or "").upper()), "argument")
            for param in command.get_params(click.Context(command))
        ]  # fmt: skip
        parts += [f"### `{f'torchport {name}'.strip()}`", table(("flag", "what it does"), rows)]
    return "\n\n".join(parts)


def core_commands() -> list[str]:
    """Name the core's own commands."""
    from torchport.cli import _COMMANDS

    return list(_COMMANDS)


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return command


def _spellings(option: click.Option) -> str:
    return ", ".join(code(spelling) for spelling in (*option.opts, *option.secondary_opts))


def older_flags() -> str:
    """Documented older flags."""
    rows = [(code(f"--{old}"), code(f"--{new.replace('_', '-')}")) for old, new in aliases.FLAGS.items()]
    rows += [(code(f"--{old}"), _slots(slots, "--{} {}")) for old, slots in aliases.SWITCHES.items()]
    rows += [(code(f"--{old}"), f"nothing: {why}") for old, why in aliases.RETIRED_SWITCHES.items()]
    rows += [(code(f"--{old}"), _inert(inert)) for old, inert in aliases.INERT_FLAGS.items()]
    return table(("older spelling", "means"), rows)


def older_keys() -> str:
    """Documented older keys of YAML files."""
    rows = [(code(old), code(new)) for old, new in aliases.YAML_KEYS.items()]
    rows += [(code(f"{old}: true"), _slots(slots, "{}: {}")) for old, slots in aliases.YAML_SWITCHES.items()]
    rows += [
        (f"{code(old)} at the top of the file", f"the same in the section {code(section)}")
        for old, section in aliases.YAML_SECTIONS.items()
    ]
    rows += [
        (
            code(f"distributed_type: {label}"),
            _distributed_type(label, slots),
        )
        for label, slots in aliases.DISTRIBUTED_TYPE_SLOTS.items()
    ]
    rows += [
        (code(f"compute_environment: {label}"), _slots(slots, "{}: {}"))
        for label, slots in aliases.COMPUTE_ENVIRONMENTS.items()
    ]
    rows += [
        (code(section), f"a section of settings of the launch; {code('launcher: ' + name)}")
        for section, name in aliases.LAUNCHER_SECTIONS.items()
    ]
    rows += [(code(old), f"sets {code(new)} in each worker") for old, new in aliases.YAML_VARIABLES.items()]
    rows += [(code(old), _inert(inert)) for old, inert in aliases.INERT_KEYS.items()]
    return table(("older key", "means"), rows)


def _distributed_type(label: str, slots: typing.Mapping[str, str]) -> str:
    if label == aliases.ONE_PROCESS:
        return f"{code('num_processes: 1')}, unless the file says how many"
    needs = " with `parallelism_config: {parallelism_config_tp_size: N}`, which the file must say"
    return _slots(slots, "{}: {}") + needs * (label in aliases.TENSOR_PARALLEL)


def older_keywords() -> str:
    """Documented older keyword arguments of `Accelerator`."""
    rows = [(code(f"{old}=..."), code(f"{slot}=...")) for old, slot in aliases.KEYWORD_SLOTS.items()]
    rows += [
        (code(f"{old}=True"), code(f'{slot}="{value}"'))
        for old, (slot, value) in aliases.KEYWORD_FLAGS.items()
    ]
    return table(("older spelling", "means"), rows)


def _slots(slots: typing.Mapping[str, str], form: str) -> str:
    return ", ".join(code(form.format(*pair)) for pair in slots.items()) or "nothing"


def _inert(inert: aliases.Inert) -> str:
    accepted = ", ".join(code(value) for value in inert.accepted if value) or "an empty value"
    if not inert.instead:
        return f"nothing with {accepted}; anything else needs the plugin that reads it"
    return f"nothing with {accepted}; anything else is an error: {inert.instead}"


# --- hooks.md ------------------------------------------------------------------------------------------------


def hook_names() -> list[str]:
    """Name the hooks, in the order of `hookspecs.py`."""
    return [name for name in vars(hookspecs) if name.startswith("torchport_")]


def hooks() -> str:
    """Every hook."""
    rows = []
    for name in hook_names():
        hook = getattr(hookspecs, name)
        signature = inspect.signature(hook)
        arguments = ", ".join(signature.parameters)
        returns = str(signature.return_annotation).strip("'")
        rows.append((f"[`{name}({arguments})`](#{name})", code(returns), _first_line(hook)))
    return table(("hook", "returns", "what it is for"), rows)


def common_fields() -> str:
    """The fields that all descriptors have."""
    return _fields(Spec, dataclasses.fields(Spec))


def own_fields(spec: type[Spec]) -> str:
    """The fields that a descriptor adds."""
    common = {field.name for field in dataclasses.fields(Spec)}
    own = [field for field in dataclasses.fields(spec) if field.name not in common]
    return _fields(spec, own) if own else "No fields of its own."


def value_fields(name: str) -> str:
    """The fields of a dataclass of the seam."""
    value = getattr(plugin, name)
    return _fields(value, dataclasses.fields(value))


def _fields(owner: type, fields: Iterable[dataclasses.Field[Any]]) -> str:
    described = attributes(owner)
    rows = [(code(f.name), code(_type(f.type)), _field_default(f), described[f.name]) for f in fields]
    return table(("field", "type", "default", "what it says"), rows)


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _field_default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "**required**"
    empty = dataclasses.is_dataclass(field.default) or field.default in (frozenset(), (), "")
    return "none" if empty else code(repr(field.default))


def attributes(owner: type) -> dict[str, str]:
    """Return what the docstring's section `Attributes:` says of each attribute."""
    _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
    section = textwrap.dedent(section.split("\n\n")[0])
    found = re.findall(r"^(\w+): (.*(?:\n[ \t]+.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def interface(name: str) -> str:
    """The methods of an interface: what must be written, and what may be overridden."""
    owner = getattr(plugin, name)
    rows = [
        (
            code(f"{member}{_signature(owner, member)}"),
            "**must**" if member in owner.__abstractmethods__ else "may",
            line,
        )
        for member, line in methods(owner).items()
    ]
    rows.sort(key=lambda row: row[1] == "may")
    return table(("method", "write it?", "what it does"), rows)


def methods(owner: type) -> dict[str, str]:
    """Return the public methods and properties of an interface, each with its docstring's first line."""
    return {
        name: _first_line(
            member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        )
        for name, member in vars(owner).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, (property, classmethod)))
    }


def _signature(owner: type, name: str) -> str:
    member = vars(owner)[name]
    if isinstance(member, property):
        return ""
    function = getattr(member, "__func__", member)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return f"({', '.join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)})"


def _first_line(function: Any) -> str:
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ")


# --- all -----------------------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Return every generated table by the name of its place in the pages."""
    made = {
        "variables": variables(),
        "older variables": older_variables(),
        "launch settings": launch_settings(),
        "plugin settings": plugins_settings(),
        "other commands": other_commands(),
        "older flags": older_flags(),
        "older keys": older_keys(),
        "older keywords": older_keywords(),
        "hooks": hooks(),
        "support": scorecards.support(),
        "levels": scorecards.levels(),
        "checks": scorecards.checks(),
        "Spec": common_fields(),
    }
    made |= {kind.spec.__name__: own_fields(kind.spec) for kind in KINDS.values()}
    made |= {name: value_fields(name) for name in VALUES}
    return made | {name: interface(name) for name in INTERFACES}
