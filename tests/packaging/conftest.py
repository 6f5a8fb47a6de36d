"""Wheels of this checkout, and clean virtual environments to install them into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_wheels(folder: Path, *sources: Path) -> list[Path]:
    """Build a wheel of each source tree, without network."""
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(folder), *map(str, sources)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(set(folder.glob("*.whl")) - before)


class Environment:
    """A virtual environment of its own, in which third-party libraries of the test environment can be imported.

    They are reached through a folder of links, without Torchport's own distributions: neither their modules nor
    their metadata are seen. What is installed here comes first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout=120, check=True)
        libraries = folder / "libraries"
        libraries.mkdir()
        for place in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
            for entry in Path(place).iterdir():
                if not entry.name.startswith(("torchport", "_editable_impl_torchport", "__editable__")):
                    (libraries / entry.name).symlink_to(entry)
        for entry in (Path(sys.prefix) / "lib").iterdir():  # libraries that are not Python's: those of MPI
            if not entry.name.startswith("python"):
                (folder / "lib" / entry.name).symlink_to(entry)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "libraries_of_the_test_environment.pth").write_text(f"{libraries}\n")

    def pip(self, *arguments: str, cwd: Path | None = None) -> None:
        """Run pip on this environment, without network."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "-q", *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(
        self, *command: str, cwd: Path | None = None, code: int | None = 0, **variables: str
    ) -> subprocess.CompletedProcess:
        """Run a program of this environment, with no variables of Torchport but those given."""
        environ = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("TORCHPORT_", "PYTHON", "PYTEST_", "VIRTUAL_ENV"))
        }
        environ |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{environ['PATH']}", **variables}
        program = str(self.folder / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            cwd=cwd or self.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels of the core and of the cpu plugin."""
    return build_wheels(tmp_path_factory.mktemp("wheels"), ROOT / "core", ROOT / "plugins" / "cpu")


@pytest.fixture
def environment(tmp_path: Path, wheels: list[Path]) -> Environment:
    """A clean environment with the core and the cpu plugin, installed from wheels."""
    made = Environment(tmp_path / "venv")
    made.pip("install", "--no-deps", "--no-index", *map(str, wheels))
    return made


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., list[Path]]:
    """Builds wheels of source trees into a folder of the test."""

    def build_here(*sources: Path) -> list[Path]:
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        return build_wheels(folder, *sources)

    return build_here
