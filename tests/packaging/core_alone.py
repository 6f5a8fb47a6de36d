"""Run pytest in a clean environment with torchport-core and torchport-cpu only: `core_alone.py ARGUMENT...`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, Environment, build_wheels

with tempfile.TemporaryDirectory() as folder:
    environment = Environment(Path(folder) / "venv")
    wheels = build_wheels(Path(folder), ROOT / "core", ROOT / "plugins" / "cpu")
    environment.pip("install", "--no-deps", "--no-index", *map(str, wheels))
    command = [str(environment.python), "-m", "pytest", *sys.argv[1:]]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sys.exit(subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode)
