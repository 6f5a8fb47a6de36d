"""The package level of the conformance kit passes a good plugin and catches each fault."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy  # noqa: F401 - the kit runs in this process, which can import extension modules only once
import pytest
import torch  # noqa: F401

GOOD = """
    from dataclasses import dataclass
    from torchport.plugin import Probe, TrackerSpec, LauncherSpec, hookimpl

    @hookimpl
    def torchport_launchers():
        yield LauncherSpec(
            name="acme", summary="starts processes", factory="torchport_acme_heavy:Launch",
            probe="torchport_acme_heavy:probe", runtime=("numpy",),
        )
"""
HEAVY = """
import numpy
from torchport.plugin import Launcher, Probe

class Launch(Launcher):
    def launch(self, job):
        return 0

    def detect(self, environ):
        return None

def probe():
    return Probe(available=False, reason="there is no scheduler on this machine")
"""
TEST = """
from torchport.testing import PackageConformance

class TestPackage(PackageConformance):
    plugin = "acme"
"""
METADATA = """Metadata-Version: 2.1
Name: torchport-acme
Version: 1.0
Summary: Acme's scheduler
Requires-Python: >=3.10
Requires-Dist: torchport-core>=0.1,<0.2
Description-Content-Type: text/markdown

# torchport-acme
"""


@pytest.fixture
def acme(site):
    """A good plugin; a test damages it."""
    site.install("torchport-acme", GOOD)
    (site.folder / "torchport_acme_heavy.py").write_text(HEAVY)
    (site.folder / "torchport_acme-1.0.dist-info" / "METADATA").write_text(METADATA)
    return site.folder


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def check(acme, pytester):
    """Runs the kit as the plugin's author would; gives the tests that failed and all that was printed."""

    def run() -> tuple[list[str], str]:
        test = pytester.makepyfile(test_package=TEST)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rfE", str(test))
        told = result.stdout.str()
        failed = [
            line.partition(" - ")[0].rpartition("::")[2]
            for line in told.splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        assert result.ret == (1 if failed else 0), told
        return failed, told

    yield run
    sys.modules.pop("torchport_acme_heavy", None)


def test_a_good_plugin_passes(check):
    failed, told = check()
    assert failed == []
    assert "7 passed" in told


def test_importing_torch_at_the_top_is_caught(acme, check):
    replace(acme / "torchport_acme.py", "from dataclasses", "import torch\nfrom dataclasses")
    assert check()[0] == ["test_importing_it_is_light"]


def test_importing_the_vendors_runtime_at_the_top_is_caught(acme, check):
    replace(acme / "torchport_acme.py", "from dataclasses", "import numpy\nfrom dataclasses")
    assert check()[0] == ["test_importing_it_is_light"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("raise OSError('no socket')", "no socket"),
        ("return False", "returned False"),
        ("return Probe(available=False)", "gave no reason"),
        ("return Probe(available=True, reason='but')", "is available, but"),
    ],
)
def test_a_probe_that_breaks_its_promise_is_caught(acme, check, answer, message):
    heavy = acme / "torchport_acme_heavy.py"
    replace(heavy, 'return Probe(available=False, reason="there is no scheduler on this machine")', answer)
    failed, told = check()
    assert failed == ["test_probes_answer_with_a_reason_and_never_raise"]
    assert message in told


def test_a_method_left_out_is_caught(acme, check):
    replace(acme / "torchport_acme_heavy.py", "def detect", "def detects")
    failed, told = check()
    assert failed == ["test_factories_name_complete_classes"]
    assert "leaves out ['detect']" in told


def test_a_class_of_another_kind_is_caught(acme, check):
    replace(acme / "torchport_acme_heavy.py", "class Launch(Launcher)", "class Launch")
    failed, told = check()
    assert failed == ["test_factories_name_complete_classes"]
    assert "is no Launcher" in told


def test_a_missing_summary_is_caught(acme, check):
    replace(acme / "torchport_acme.py", 'summary="starts processes", ', "")
    assert check()[0] == ["test_specs_have_a_summary"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Summary: Acme's scheduler\n", ""),
        ("\n# torchport-acme\n", ""),
        (",<0.2", ""),
        ("Requires-Python: >=3.10\n", ""),
    ],
)
def test_missing_metadata_is_caught(acme, check, old, new):
    replace(acme / "torchport_acme-1.0.dist-info" / "METADATA", old, new)
    assert check()[0] == ["test_metadata_is_complete"]


def test_a_plugin_that_cannot_be_registered_fails_with_the_reason(acme, check):
    replace(acme / "torchport_acme.py", "def torchport_launchers", "def torchport_launcher")
    failed, told = check()
    assert "test_it_is_registered_and_offers_something" in failed
    assert "there is no hook 'torchport_launcher'" in told
