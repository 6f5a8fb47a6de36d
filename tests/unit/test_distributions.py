"""Installed distributions are read as `importlib.metadata` reads them, mostly without it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile

import pytest
from torchport.plugin.distributions import Announcement, announcements, version_of
from torchport.testing.installing import metadata

METADATA = """Metadata-Version: 2.1
Name: Acme_Chip
Version: {version}
License: one that
  Version: goes over several lines
\x20\x20
  with empty ones
Requires-Dist: torchport-core>=0.1
Requires-Dist: acme-runtime>=2; extra == "all"

Version: 99 is what the description says
"""
POINTS = """
[console_scripts]
chip = acme:main

[torchport]
# the backend
chip = acme.plugin:hooks [all]
other=acme_other
"""


def install(folder, name="acme_chip-{version}.dist-info", version="1.0", file="METADATA", points=POINTS):
    info = folder / name.format(version=version)
    info.mkdir(parents=True)
    (info / file).write_text(METADATA.format(version=version))
    (info / "entry_points.txt").write_text(points)
    return info


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder at the front of `sys.path`."""
    made = tmp_path / "first"
    made.mkdir()
    monkeypatch.syspath_prepend(made)
    return made


def acme():
    return [one for one in announcements("torchport") if one.distribution == "Acme_Chip"]


def test_everything_installed_here_is_read_as_importlib_reads_it():
    def ordered(found):
        return sorted(found, key=lambda one: (one.distribution, one.name))

    for group in ("torchport", "console_scripts", "pytest11"):
        found = importlib.metadata.entry_points(group=group)
        assert ordered(announcements(group)) == ordered(map(Announcement.of, found))
        assert group == "torchport" or found
    names = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    assert {name: version_of(name) for name in names} == {
        name: importlib.metadata.version(name) for name in names
    }


def test_entry_points_come_with_name_version_and_requirements(folder):
    install(folder)
    requires = ("torchport-core>=0.1", 'acme-runtime>=2; extra == "all"')
    assert acme() == [
        Announcement("chip", "acme.plugin:hooks", "Acme_Chip", "1.0", requires),
        Announcement("other", "acme_other", "Acme_Chip", "1.0", requires),
    ]
    assert version_of("acme-chip") == version_of("ACME.chip") == "1.0"
    assert version_of("acme") is None


def test_the_first_distribution_of_a_name_on_the_path_counts(folder, tmp_path, monkeypatch):
    install(folder, version="1.0")
    monkeypatch.syspath_prepend(tmp_path / "second")
    install(tmp_path / "second", version="2.0", points="[torchport]\nchip = newer\n")
    assert [(one.reference, one.version) for one in acme()] == [("newer", "2.0")]
    assert version_of("acme-chip") == "2.0"


def test_what_is_installed_meanwhile_is_seen(folder):
    assert acme() == []
    assert version_of("acme-chip") is None
    install(folder)
    assert len(acme()) == 2
    assert version_of("acme-chip") == "1.0"


def test_older_formats_are_left_to_importlib(folder):
    install(folder, name="acme_chip.egg-info", file="PKG-INFO", version="0.9")
    assert {(one.name, one.reference, one.version) for one in acme()} == {
        ("chip", "acme.plugin:hooks", "0.9"),
        ("other", "acme_other", "0.9"),
    }
    assert version_of("acme-chip") == "0.9"


def test_archives_are_left_to_importlib(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "acme.zip", "w") as archive:
        archive.writestr("acme_chip-3.0.dist-info/METADATA", METADATA.format(version="3.0"))
        archive.writestr("acme_chip-3.0.dist-info/entry_points.txt", POINTS)
    monkeypatch.syspath_prepend(tmp_path / "acme.zip")
    assert [one.name for one in acme()] == ["chip", "other"]
    assert version_of("acme-chip") == "3.0"


def test_finders_that_bring_distributions_are_asked():
    with metadata({"acme-chip": "4.0"}):
        assert version_of("acme-chip") == "4.0"
    assert version_of("acme-chip") is None


def test_a_folder_of_metadata_that_cannot_be_read_is_no_distribution(folder):
    (folder / "acme_chip-1.0.dist-info").mkdir()
    assert version_of("acme-chip") is None
    assert acme() == []


def test_discovering_imports_neither_importlib_metadata_nor_packaging():
    script = (
        "import sys; from torchport.plan.discovery import discover; found = discover({'TORCHPORT_PLUGINS': 'cpu'});"
        "print([plugin.name for plugin in found.plugins], found.probe(found.find('backend', 'cpu', 'it').spec).count,"
        " sorted({'importlib.metadata', 'packaging', 'subprocess', 'torch'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout == "['core', 'cpu'] 1 []\n"
