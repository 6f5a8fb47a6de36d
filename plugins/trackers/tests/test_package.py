"""The trackers plugin as a package."""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torchport.plan.discovery import discover
from torchport.testing import PackageConformance


class TestPackage(PackageConformance):
    plugin = "trackers"


def canonical(requirement: Requirement) -> str:
    return f"{canonicalize_name(requirement.name)}{requirement.specifier}"


def test_each_tracker_has_an_extra_that_brings_its_runtime():
    distribution = importlib.metadata.distribution("torchport-trackers")
    extras: dict[str, set[str]] = {}
    for text in distribution.requires or ():
        requirement = Requirement(text)
        for extra in distribution.metadata.get_all("Provides-Extra") or ():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                extras.setdefault(extra.replace("-", "_"), set()).add(canonical(requirement))
    entries = discover({}).entries["tracker"].values()
    specs = {e.spec.name: e.spec for e in entries if e.plugin.name == "trackers"}
    assert len(specs) == 9
    assert extras.keys() == specs.keys()
    assert {
        name
        for name, spec in specs.items()
        if not {canonical(Requirement(text)) for text in spec.runtime} <= extras[name]
    } == set()
