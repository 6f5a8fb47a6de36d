"""Descriptors refuse nonsense when they are made, with what to write instead."""

from __future__ import annotations

import dataclasses

import pytest
from torchport.errors import InvalidSpecError, TorchportError
from torchport.plugin import (
    KINDS,
    BackendSpec,
    Capabilities,
    CollectivesSpec,
    Finding,
    Requirements,
    StrategySpec,
    Topology,
    TrackerSpec,
)


@pytest.mark.parametrize("name", ["acme", "acme-2", "a_b", "3dfx"])
def test_names_that_are_fine(name):
    assert TrackerSpec(name=name, factory="m:F").name == name


@pytest.mark.parametrize("name", ["", "Acme", "a b", "-a", "a--b", "a.b", "a/b", "ä", 7])
def test_names_that_are_not(name):
    with pytest.raises(InvalidSpecError, match="is not a plugin name"):
        TrackerSpec(name=name, factory="m:F")


def test_aliases_are_names_too():
    with pytest.raises(InvalidSpecError, match="'X' is not a plugin name"):
        TrackerSpec(name="a", factory="m:F", aliases=("X",))


@pytest.mark.parametrize("reference", ["", "module", "module:", ":Class", "a-b:C", "m:F()", None])
def test_a_factory_is_a_module_and_a_name(reference):
    with pytest.raises(InvalidSpecError, match="factory must be of the form 'module:Name'"):
        TrackerSpec(name="a", factory=reference)


def test_a_probe_is_required_of_backends_only():
    with pytest.raises(InvalidSpecError, match="probe must be of the form"):
        BackendSpec(name="a", factory="m:F", device_type="a", probe="")
    assert CollectivesSpec(name="a", factory="m:F").probe == ""


def test_a_text_where_a_tuple_belongs_is_shown_how_to_write_it():
    with pytest.raises(InvalidSpecError) as caught:
        TrackerSpec(name="a", factory="m:F", aliases="b")
    assert caught.value.hint == "aliases=('b',)"


def test_a_runtime_requirement_must_be_one():
    with pytest.raises(InvalidSpecError, match="'torch-acme=>2' is not a requirement"):
        TrackerSpec(name="a", factory="m:F", runtime=("torch-acme=>2",))


@pytest.mark.parametrize("value", ["high", 1.5, True])
def test_a_priority_is_an_integer(value):
    with pytest.raises(InvalidSpecError, match="priority must be an integer"):
        StrategySpec(name="a", factory="m:F", priority=value)


@pytest.mark.parametrize("api", [-1, 2])
def test_descriptors_of_another_seam_are_refused(api):
    with pytest.raises(InvalidSpecError, match=f"was written for hook API {api}"):
        TrackerSpec(name="a", factory="m:F", api=api)


def test_descriptors_cannot_be_changed():
    spec = TrackerSpec(name="a", factory="m:F")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "b"


def test_each_kind_has_its_own_hook_and_variable():
    assert [kind.variable for kind in KINDS.values()] == [
        "TORCHPORT_BACKEND",
        "TORCHPORT_COLLECTIVES",
        "TORCHPORT_PRECISION",
        "TORCHPORT_STRATEGY",
        "TORCHPORT_LAUNCHER",
        "TORCHPORT_TRACKERS",
        "TORCHPORT_QUANTIZER",
        "",
    ]
    assert all(kind.spec.kind == name for name, kind in KINDS.items())


def test_what_is_missing_is_told_in_words():
    needs = Requirements(
        autocast=frozenset({"float16", "bfloat16"}),
        grad_scaler=True,
        distributed=True,
        features=frozenset({"fp8"}),
    )
    assert needs.missing(Capabilities(autocast=frozenset({"bfloat16"}), distributed=False)) == (
        "autocast to float16",
        "gradient scaler",
        "process groups",
        "fp8",
    )
    able = Capabilities(
        autocast=frozenset({"float16", "bfloat16"}), grad_scaler=True, features=frozenset({"fp8"})
    )
    assert needs.missing(able) == ()


def test_a_finding_has_one_of_three_levels():
    with pytest.raises(InvalidSpecError, match="'error'"):
        Finding(level="fatal", subject="a", message="b")


@pytest.mark.parametrize("place", [{"rank": 2, "world_size": 2}, {"local_rank": 1}, {"rank": -1}])
def test_a_place_outside_the_job_is_no_topology(place):
    with pytest.raises(InvalidSpecError, match="is not a place in a job"):
        Topology(**place)


def test_an_error_says_what_was_wanted_found_why_not_and_what_to_type_in_this_order():
    error = TorchportError("wanted", found="this", reason="because", hint="that")
    assert str(error) == "wanted\n  found:  this\n  reason: because\n  try:    that"
