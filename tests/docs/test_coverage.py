"""Nothing that users can set, and nothing that plugins can implement, is undocumented."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from torchport import Accelerator, aliases, envvars, plugin
from torchport.cli import _COMMANDS, cli
from torchport.config import schema
from torchport.config.dynamo import TorchDynamoPlugin
from torchport.config.launch import LaunchConfig
from torchport.plan.discovery import discover
from torchport.plan.registry import load_reference
from torchport.plugin import hookspecs
from torchport.plugin.specs import KINDS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = (ROOT / "docs" / "environment.md").read_text()
HOOKS = (ROOT / "docs" / "hooks.md").read_text()
OURS = {
    re.search(r'^name = "(.+)"$', file.read_text(), re.MULTILINE)[1]
    for file in (ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"))
}


def hooks() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("torchport_")]


def dataclasses_of_the_seam() -> dict[str, type]:
    values = {name: getattr(plugin, name) for name in plugin.__all__}
    return {n: v for n, v in values.items() if inspect.isclass(v) and dataclasses.is_dataclass(v)}


def interfaces() -> dict[str, type]:
    values = {name: getattr(plugin, name) for name in plugin.__all__}
    return {n: v for n, v in values.items() if inspect.isclass(v) and inspect.isabstract(v)}


def flags() -> set[str]:
    """Every flag of every command, older spellings included."""
    found = set()
    for command in (cli, *(cli.get_command(click.Context(cli), name) for name in _COMMANDS)):
        for parameter in command.get_params(click.Context(command)):
            if isinstance(parameter, click.Option):
                found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def settings() -> list[schema.Setting]:
    """Every setting of a launch, and of the plugins that this repository publishes."""
    entries = [entry for kind in discover({}).entries.values() for entry in kind.values()]
    configs = {e.spec.config for e in entries if e.spec.config and e.plugin.distribution in OURS}
    return [
        item
        for config in (
            LaunchConfig,
            TorchDynamoPlugin,
            *(load_reference(config) for config in sorted(configs)),
        )
        for item in schema.settings_of(config)
    ]


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, down to the next of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"there is no heading {heading!r}"
    return found[2]


def first_cells(text: str) -> set[str]:
    """Return the inline code in the first column of all tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {cell for row in rows for cell in re.findall(r"`([^`]+)`", row)}


def in_tables(text: str) -> set[str]:
    """Return the inline code anywhere in tables."""
    return {c for line in text.splitlines() if line.startswith("| ") for c in re.findall(r"`([^`]+)`", line)}


def missing(names, text: str) -> list[str]:
    return sorted(set(names) - in_tables(text))


@pytest.mark.parametrize("hook", hooks())
def test_each_hook_has_an_example_that_implements_it(hook):
    text = HOOKS[HOOKS.index(f"\n## {hook}\n") :]
    text = text[: text.index("\n## ", 2)]
    assert re.search(rf"^```python title=.*?^@hookimpl\ndef {hook}\(.*?^```", text, re.DOTALL | re.MULTILINE)
    assert f"`{hook}(" in HOOKS[: HOOKS.index("\n## ")]


@pytest.mark.parametrize("name", sorted(dataclasses_of_the_seam()))
def test_each_field_of_the_seam_is_in_its_table(name):
    fields = {field.name for field in dataclasses.fields(dataclasses_of_the_seam()[name])}
    if issubclass(dataclasses_of_the_seam()[name], plugin.Spec) and name != "Spec":
        fields -= {field.name for field in dataclasses.fields(plugin.Spec)}
    assert fields - first_cells(section(HOOKS, name)) == set()


@pytest.mark.parametrize("name", sorted(interfaces()))
def test_each_method_of_an_interface_is_in_its_table(name):
    public = {member for member in vars(interfaces()[name]) if not member.startswith("_")}
    listed = {
        cell.partition("(")[0]: row for row in section(HOOKS, name).splitlines() for cell in first_cells(row)
    }
    assert (
        public - {"scaler", "scaling"} <= listed.keys()
    )  # attributes of Precision, which its docstring explains
    must = {member for member, row in listed.items() if "| **must** |" in row}
    assert must == interfaces()[name].__abstractmethods__


def test_everything_that_the_seam_exports_is_named():
    assert [name for name in plugin.__all__ if not re.search(rf"\b{name}\b", HOOKS)] == []


def test_each_variable_is_documented():
    names = {variable.name for variable in envvars.VARIABLES} | {item.env for item in settings() if item.env}
    names |= {spec.visible_devices_env for spec in discover({}).specs("backend") if spec.visible_devices_env}
    older = {*aliases.ENVIRONMENT, *(f"{name}=1" for name in aliases.ENVIRONMENT_SWITCHES)}
    assert missing(names | older, ENVIRONMENT) == []


def test_each_flag_is_documented():
    derived = {f"--{item.flag}" for item in settings() if item.flag}
    assert missing(flags() | derived, ENVIRONMENT) == []


def test_each_command_is_documented():
    for name in _COMMANDS:
        assert f"`torchport {name}`\n" in ENVIRONMENT


def test_each_yaml_key_is_documented():
    keys = {item.yaml for item in settings() if item.yaml}
    keys |= {*aliases.YAML_KEYS, *aliases.INERT_KEYS, *aliases.LAUNCHER_SECTIONS, *aliases.YAML_VARIABLES}
    keys |= {f"{name}: true" for name in aliases.YAML_SWITCHES}
    keys |= {f"distributed_type: {label}" for label in aliases.DISTRIBUTED_TYPE_SLOTS}
    keys |= {f"compute_environment: {label}" for label in aliases.COMPUTE_ENVIRONMENTS}
    assert missing(keys, ENVIRONMENT) == []


def test_each_older_keyword_is_documented():
    keywords = {f"{name}=..." for name in aliases.KEYWORD_SLOTS} | {
        f"{name}=True" for name in aliases.KEYWORD_FLAGS
    }
    assert missing(keywords, ENVIRONMENT) == []
    assert not keywords & {f"{name}=..." for name in inspect.signature(Accelerator).parameters}


def test_each_variable_that_selects_is_in_the_readme():
    variables = {kind.variable for kind in KINDS.values() if kind.variable}
    assert missing(variables, (ROOT / "README.md").read_text()) == []


@pytest.mark.parametrize("name", ["TORCHPORT_TIMEOUT", "--tee", "ddp_bucket_cap_mb", "--no-quiet"])
def test_what_is_taken_out_of_the_page_is_missed(name):
    assert missing([name], ENVIRONMENT) == []
    assert missing([name], ENVIRONMENT.replace(f"`{name}`", "")) == [name]


def build(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docs" / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_generated_tables_are_current_and_every_link_leads_somewhere():
    done = build("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = ROOT / "docs" / "page.md"
    text = (
        "# A `b` c\n[x](hooks.md#spec) [y](#a-b-c) [z](https://example.org)\n```text\n[n](nowhere.md)\n```\n"
    )
    assert module.broken_links(page, text) == []
    text = "[x](hooks.md#specs) ![y](no.png) [z](#a)\n"
    assert module.broken_links(page, text) == [
        "docs/page.md: hooks.md#specs leads to no heading",
        "docs/page.md: no.png leads to no file",
        "docs/page.md: #a leads to no heading",
    ]
