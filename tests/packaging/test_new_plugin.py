"""`torchport new-plugin` writes a plugin that installs, is listed, works, and passes its own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import preforking
import pytest

from .conftest import Environment

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parents[2]
KINDS = ("backend", "collectives", "precision", "strategy", "launcher", "tracker", "quantizer")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory, wheels):
    """A new plugin of every kind, all installed into one environment; the folder of each has its tests' output."""
    folder = tmp_path_factory.mktemp("plugins")
    environment = Environment(folder / "venv")
    environment.pip("install", "--no-deps", "--no-index", *map(str, wheels))
    folders = {kind: folder / kind / f"torchport-acme-{kind}" for kind in KINDS}
    for kind, made in folders.items():
        made.parent.mkdir()
        environment.run("torchport", "new-plugin", f"acme-{kind}", "--kind", kind, cwd=made.parent)
        assert [path.name for path in made.parent.iterdir()] == [made.name]
    editable = [argument for made in folders.values() for argument in ("-e", str(made))]
    environment.pip("install", "--no-index", "--no-build-isolation", *editable)
    held = preforking.hold(folder)
    try:
        python = str(preforking.start(folder, str(environment.python)) / "python")
        for made in folders.values():
            command = [python, "-m", "pytest", "-p", "no:cacheprovider"]
            done = environment.run(*command, cwd=made, code=None, PREFORK_EXECUTABLE=python)
            (made / "session.txt").write_text(done.stdout + done.stderr)
    finally:
        os.close(held)
    return environment, folders


def test_new_plugins_of_all_kinds_are_listed_beside_each_other(plugins):
    environment, _ = plugins
    listing = json.loads(environment.run("torchport", "plugins", "--json").stdout)
    ours = {
        (item["distribution"], item["kind"], item["name"], item["available"])
        for item in listing["plugins"]
        if item["distribution"].startswith("torchport-acme")
    }
    assert ours == {(f"torchport-acme-{kind}", kind, f"acme-{kind}", True) for kind in KINDS}
    assert listing["failures"] == []
    assert listing["clashes"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_passes_its_own_tests(plugins, kind):
    _, folders = plugins
    tests = (folders[kind] / "session.txt").read_text()
    assert "passed" in tests
    assert "failed" not in tests
    assert "error" not in tests
    assert "skipped" not in tests


def test_a_new_backend_leaves_automatic_selection_as_it_was(environment, tmp_path):
    environment.run("torchport", "new-plugin", "acme", "--kind", "backend", cwd=tmp_path)
    environment.pip(
        "install", "--no-index", "--no-build-isolation", "--no-deps", str(tmp_path / "torchport-acme")
    )
    made = json.loads(environment.run("torchport", "plan", "--json").stdout)
    assert made["slots"]["backend"]["choice"] == ["cpu"]
    assert made["slots"]["backend"]["rejected"] == [{"name": "acme", "reason": "lower priority (-1 < 0)"}]


def test_a_new_plugin_with_a_longer_name_is_consistent(tmp_path):
    done = new_plugin(tmp_path, "torchport-acme-two", "--kind", "backend")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "torchport-acme-two"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "pyproject.toml",
        "src/torchport_acme_two/__init__.py",
        "src/torchport_acme_two/backend.py",
        "tests/test_backend.py",
        "tests/test_conformance.py",
        "tests/test_package.py",
        "tests/test_training.py",
        "tests/train.py",
    ]
    spec = (folder / "src" / "torchport_acme_two" / "__init__.py").read_text()
    assert 'name="acme-two"' in spec
    assert 'factory="torchport_acme_two.backend:AcmeTwoBackend"' in spec
    assert 'acme-two = "torchport_acme_two"' in (folder / "pyproject.toml").read_text()
    assert not [path for path in folder.rglob("*") if path.is_file() and "{{" in path.read_text()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_formatted_and_passes_the_linter(tmp_path, kind):
    assert new_plugin(tmp_path, "acme", "--kind", kind).returncode == 0
    rules = ["--isolated", "--select", "E,F,W,UP,B,D,ANN", "--ignore", "D105,D107,ANN401"]
    options = ["--line-length", "120", "--config", "lint.pydocstyle.convention = 'google'"]
    command = [sys.executable, "-m", "ruff", "check", *rules, *options, "torchport-acme/src"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def new_plugin(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torchport", "new-plugin", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["Acme!", "2fast", "-x", "a--b", "a b", "torchport-"])
def test_a_name_that_pip_or_python_would_not_take_is_refused(tmp_path, name):
    done = new_plugin(tmp_path, "--kind", "backend", "--", name)
    assert done.returncode == 2
    assert "is not a plugin name" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_core_offers_itself_is_refused(tmp_path):
    done = new_plugin(tmp_path, "ddp", "--kind", "strategy")
    assert done.returncode == 2
    assert "the core itself offers 'ddp'" in done.stderr


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.py").write_text("precious")
    done = new_plugin(tmp_path, "acme", "--kind", "tracker", "--output", "mine")
    assert done.returncode == 2
    assert "exists and is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["work.py"]


def test_the_template_is_in_the_source_distribution_and_in_the_wheel_made_from_it(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path), str(ROOT / "core")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    import tarfile
    import zipfile

    files = {
        str(path.relative_to(ROOT / "contrib" / "_template"))
        for path in (ROOT / "contrib" / "_template").rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        prefix = "torchport/cli/_template/"
        assert {name.removeprefix(prefix) for name in wheel.namelist() if name.startswith(prefix)} == files
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as source:
        members = [member for member in source.getmembers() if "/_template/" in member.name]
        assert {member.name.partition("/_template/")[2] for member in members} == files
        assert all(member.isfile() for member in members)
