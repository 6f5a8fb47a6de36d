"""Run tests in a clean environment with torchport-core and torchport-cpu only: `core_alone.py FOLDER...`.

As `make test` does: those that prove time limits by themselves, then the others, two files at a time.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, Environment, build_wheels

ALONE = ["-m", "alone and not plugins"]
OTHERS = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not (alone or long or plugins)"]

with tempfile.TemporaryDirectory() as folder:
    environment = Environment(Path(folder) / "venv")
    wheels = build_wheels(Path(folder), ROOT / "core", ROOT / "plugins" / "cpu")
    environment.pip("install", "--no-deps", "--no-index", *map(str, wheels))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Programs of third-party libraries, as mpirun, are those of the environment that runs this.
    variables["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    command = [str(environment.python), "-m", "pytest", *sys.argv[1:]]
    codes = [
        subprocess.run([*command, *options], cwd=ROOT, env=variables, check=False).returncode
        for options in (ALONE, OTHERS)
    ]
sys.exit(max(codes))
