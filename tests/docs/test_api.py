"""Every documented name of `docs/api.md` can be imported from where the page says, with the parameters it lists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torchport
from torchport import Accelerator, aliases
from torchport.plan.discovery import discover
from torchport.state import AcceleratorState, GradientState, PartialState

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
LISTED, _, REST = PAGE.partition("\n## From plugins\n")
FROM_PLUGINS, _, NOT_YET = REST.partition("\n## Not yet\n")


class Row(NamedTuple):
    name: str
    module: str
    kind: str
    words: tuple[str, ...]


def rows() -> list[Row]:
    found = []
    for line in LISTED.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        words = tuple(re.findall(r"`([^`]+)`", cells[2]))
        kind = re.sub(r"`[^`]+`[, ]*", "", cells[2]).strip() or "parameters"
        found.append(Row(cells[0].strip("`"), cells[1].strip("`"), kind, words))
    return found


@pytest.fixture(scope="module")
def instances():
    AcceleratorState._reset_state()
    accelerator = Accelerator()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    made = accelerator.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    objects = (accelerator, PartialState(), AcceleratorState(), GradientState(), *made)
    yield {type(one).__name__: one for one in objects}
    AcceleratorState._reset_state()


def parameters(thing) -> set[str]:
    """The names of all parameters, `*` and `**` included; also the older keywords that a class understands."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = {stars.get(p.kind, "") + p.name for p in inspect.signature(thing).parameters.values()}
    return found | ({*aliases.KEYWORD_SLOTS, *aliases.KEYWORD_FLAGS} if thing is Accelerator else set())


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.module}:{row.name}")
def test_a_documented_name_is_there_with_its_parameters(row, instances):
    owner, _, member = row.name.partition(".")
    thing = getattr(importlib.import_module(row.module), owner)
    if member:
        holder = instances.get(owner, thing)
        thing = getattr(holder, member)
    if row.kind == "parameters":
        assert callable(thing)
        assert set(row.words) - parameters(thing) == set()
    elif row.kind == "-":
        assert callable(thing)
    elif row.kind == "members":
        assert [getattr(thing, label).name for label in row.words] == list(row.words)
    elif row.kind == "is":
        assert (thing,) == row.words
    elif row.kind == "class":
        assert inspect.isclass(thing)
    else:
        assert row.kind == "property"
        assert not inspect.isfunction(thing)


def test_the_page_lists_names_once_and_none_as_missing_too():
    names = [f"{row.module}:{row.name}" for row in rows()]
    assert len(names) > 200
    assert sorted(names) == sorted(set(names))
    missing, brought = names_not_yet(), {name for name, _, _ in names_of_plugins()}
    assert not missing & {row.name for row in rows()}
    assert not missing & brought
    assert not brought & {row.name for row in rows()}


def names_of_plugins() -> list[tuple[str, str, str]]:
    """Each name that a plugin brings, with the module to import it from and what it comes with."""
    found = []
    for line in FROM_PLUGINS.splitlines():
        if line.startswith("| `"):
            names, module, plugin = (cell.strip() for cell in line.strip("|").split("|"))
            found += [(name, module.strip("`"), plugin) for name in re.findall(r"`([^`]+)`", names)]
    return found


def names_not_yet() -> set[str]:
    cells = [line.split("|")[1] for line in NOT_YET.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def modules() -> list[ModuleType]:
    """All modules of the core that users may import from."""
    names = [found.name for found in pkgutil.iter_modules(torchport.__path__) if found.name != "__main__"]
    return [torchport, *(importlib.import_module(f"torchport.{name}") for name in names)]


def importable(names: set[str]) -> list[str]:
    """Say which of these names can be imported, and from where; a plugin that is missing does not matter."""
    known = {*aliases.PLUGIN_NAMES, *aliases.TRACKER_CLASSES} & names
    everywhere = modules()
    found = [
        f"{module.__name__}.{name}"
        for name in names - known
        for module in everywhere
        if hasattr(module, name)
    ]
    return sorted([*found, *known, *(name for name in names if hasattr(Accelerator, name))])


def test_a_name_that_is_listed_as_not_yet_cannot_be_imported():
    assert len(names_not_yet()) > 30
    assert importable(names_not_yet()) == []


def test_a_name_that_has_come_since_is_found_out():
    assert importable({"dispatch_model", "set_seed", "WandBTracker", "prepare_pippy"}) == [
        "WandBTracker",
        "torchport.inference.prepare_pippy",
        "torchport.prepare_pippy",
        "torchport.set_seed",
        "torchport.utils.set_seed",
    ]


def test_every_name_that_a_plugin_brings_is_on_the_page_and_offered_by_it():
    on_page = {name: module for name, module, _ in names_of_plugins()}
    assert on_page == dict.fromkeys(aliases.PLUGIN_NAMES, "torchport.utils") | dict.fromkeys(
        aliases.TRACKER_CLASSES, "torchport.tracking"
    )
    trackers = {spec.name: spec.factory.partition(":")[2] for spec in discover({}).specs("tracker")}
    for name, _, plugin in names_of_plugins():
        if name in aliases.TRACKER_CLASSES:
            assert (trackers[aliases.TRACKER_CLASSES[name]], "trackers" in plugin) == (name, True)
        else:
            assert f"`{aliases.PLUGIN_NAMES[name]}`" in plugin
            assert name in importlib.import_module(f"torchport_{aliases.PLUGIN_NAMES[name]}").__all__


def test_members_that_accelerate_does_not_document_are_listed_as_added():
    listed = {row.name.removeprefix("Accelerator.") for row in rows() if row.name.startswith("Accelerator.")}
    added = LISTED.partition("\n## Added\n")[2]
    public = {name for name in dir(Accelerator) if not name.startswith("_")}
    assert public - listed - set(re.findall(r"`([^`]+)`", added)) == set()


def test_every_utility_is_on_the_page():
    from torchport import utils

    listed = {row.name for row in rows()}
    assert set(utils.__all__) - listed - {"Progress"} == set()
