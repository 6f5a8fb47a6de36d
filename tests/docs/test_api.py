"""Every documented name of `docs/api.md` can be imported from where the page says, with the parameters it lists."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torchport import Accelerator, aliases
from torchport.state import AcceleratorState, GradientState, PartialState

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
LISTED, _, NOT_YET = PAGE.partition("\n## Not yet\n")


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
    missing = set(re.findall(r"`([^`]+)`", NOT_YET))
    assert not missing & {row.name for row in rows()}


def test_members_that_accelerate_does_not_document_are_listed_as_added():
    listed = {row.name.removeprefix("Accelerator.") for row in rows() if row.name.startswith("Accelerator.")}
    added = LISTED.partition("\n## Added\n")[2]
    public = {name for name in dir(Accelerator) if not name.startswith("_")}
    assert public - listed - set(re.findall(r"`([^`]+)`", added)) == set()


def test_every_utility_is_on_the_page():
    from torchport import utils

    listed = {row.name for row in rows()}
    assert set(utils.__all__) - listed - {"Progress"} == set()
