"""Plain requirements are judged as `packaging` judges them, without importing it."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from torchport.plugin import missing_runtime
from torchport.plugin.requirements import name_of, plain_name, plainly_met

NUMBERS = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))
VERSIONS = st.tuples(NUMBERS, st.sampled_from(["", "+cpu", "+rocm6.2", "+cu.1"])).map("".join)
BOUNDS = st.lists(st.tuples(st.sampled_from([">=", "<=", "<", ">"]), NUMBERS).map("".join), max_size=3)


@given(BOUNDS, VERSIONS)
def test_plain_requirements_are_judged_as_packaging_does(bounds, version):
    text = "name" + ",".join(bounds)
    assert plain_name(text) == "name"
    assert plainly_met(text, version) == Requirement(text).specifier.contains(version)


@pytest.mark.parametrize(
    "text", ["a[x]>=1", "a>=1; python_version>'3'", "a==1.*", "a>=1.0rc1", "a>=", "a b", ">=1", ""]
)
def test_anything_else_is_left_to_packaging(text):
    assert plain_name(text) == ""
    assert plainly_met(text, "1.0") is None


def test_versions_that_are_not_plain_are_left_to_packaging():
    assert plainly_met("a>=1", "2.13.0rc1") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Torchport_Core>=1", "torchport-core"),
        ("a.b[x]; y", "a-b"),
        ("torchport-core-x", "torchport-core-x"),
        (">=1", ""),
    ],
)
def test_names_are_normalized(text, name):
    assert name_of(text) == name


def test_what_is_not_installed_is_said_without_packaging(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert missing_runtime(("pluggy>=1.0", "acme-never>=2")) == (
        "needs acme-never>=2, which is not installed: pip install 'acme-never>=2'"
    )
    with pytest.raises(ImportError):
        missing_runtime(("pluggy>=1.0; python_version>'3'",))
