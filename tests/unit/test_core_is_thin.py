"""The core names no vendor, its layers point one way, and importing it costs next to nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "core" / "src" / "torchport"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if "_template" not in path.parts)
VENDORS = re.compile(
    r"\b(?:cuda|nccl|xpu|hpu|habana|npu|hccl|mlu|musa|sdaa|mps|tpu|xla|rocm|neuron|deepspeed|fsdp|megatron)\b",
    re.IGNORECASE,
)
VENDORS_ALLOWED_IN = {"aliases.py"}

LOW = {"errors", "envvars", "aliases", "lazy", "config.schema", "plugin"}
LAYERS: dict[str, set[str]] = {
    # What each part of the core may import of the rest, at import time or when called. Types do not count.
    "errors": set(),
    "envvars": set(),
    "aliases": {"errors", "envvars"},
    "lazy": set(),
    "config.schema": {"errors"},
    "plugin": {"errors", "envvars", "lazy", "config.schema"},
    "plan": {"errors", "envvars", "aliases", "config.schema", "plugin", "builtin"},
    "config": {"errors", "envvars", "aliases", "config.schema", "plugin", "plan"},
    "ops": {"errors", "envvars", "plugin"},
    "labels": {"errors", "envvars", "aliases"},
    "distributed_type": {"errors", "envvars", "aliases", "labels"},
    "process_control": {"errors", "plugin", "ops"},
    "exchange_control": {"ops", "state"},
    "runtime": {*LOW, "config", "plan", "ops", "distributed_type"},
    "state": {*LOW, "config", "plan", "ops", "distributed_type", "process_control", "runtime"},
    "rank": {"envvars", "aliases", "plan", "plugin", "runtime"},
    "training": {*LOW, "config", "plan", "ops", "rank", "runtime", "state"},
    "data": {*LOW, "config", "ops", "runtime", "state", "training"},
    "checkpoint": {*LOW, "config", "plan", "ops", "process_control", "runtime", "training"},
    "preparation": {*LOW, "config", "runtime", "state", "training", "data", "checkpoint"},
}
"""What is not listed (the façade, the command line) may import anything below it."""


def layer(dotted: str) -> str:
    """Return the longest prefix of a module's name that is a layer, or else its first part."""
    parts = dotted.split(".")
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LAYERS), parts[0])


def layer_of(path: Path) -> str:
    return layer(".".join(path.relative_to(SOURCE).with_suffix("").parts))


def imports(tree: ast.AST) -> set[str]:
    """Return the layers that a module imports, wherever it does so, except for types alone."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchport":
            module = node.module.split(".")[1:]
            found |= {layer(".".join([*module, alias.name])) for alias in node.names}
        elif isinstance(node, ast.Import):
            named = [alias.name.split(".") for alias in node.names]
            found |= {layer(".".join(parts[1:])) for parts in named if parts[0] == "torchport" and parts[1:]}
        found |= imports(node)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_vendor_is_named(path):
    if path.name in VENDORS_ALLOWED_IN:
        return
    named = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if VENDORS.search(line)
    ]
    assert named == []


def test_the_list_of_vendors_finds_what_it_should():
    assert VENDORS.search("if device.type == 'cuda':")
    assert VENDORS.search("# FSDP needs this")
    assert not VENDORS.search("a barracuda swims, an input is read")


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_low_layer_imports_only_what_is_below_it(name):
    allowed = LAYERS[name] | {name}
    wrong = {
        f"{path.relative_to(SOURCE)} imports torchport.{imported}"
        for path in MODULES
        if layer_of(path) == name
        for imported in imports(ast.parse(path.read_text())) - allowed
    }
    assert wrong == set()


@pytest.mark.parametrize(
    ("top", "users"),
    [("cli", {"cli", "__main__"}), ("accelerator", {"__init__", "testing"}), ("testing", {"testing", "cli"})],
)
def test_nothing_else_imports_what_stands_on_top(top, users):
    importers = {layer_of(path) for path in MODULES if top in imports(ast.parse(path.read_text()))}
    assert importers - {top} <= users


def test_every_low_layer_exists():
    assert set(LAYERS) <= {layer_of(path) for path in MODULES}


def test_planning_uses_the_builtin_descriptors_and_not_their_classes():
    used = set()
    for path in MODULES:
        if layer_of(path) == "plan":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchport.builtin"):
                    used.add(node.module)
    assert used == set()


def run(code: str) -> str:
    command = [sys.executable, "-X", "frozen_modules=on", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("torchport", {"torch", "pluggy", "click", "rich", "yaml", "numpy", "torchport_cpu"}),
        ("torchport.plugin", {"torch", "rich", "yaml", "numpy", "torchport_cpu"}),
        ("torchport.plan.selection", {"torch", "rich", "yaml", "numpy", "torchport_cpu"}),
        ("torchport.plan.discovery", {"torch", "rich", "yaml", "numpy", "torchport_cpu"}),
        ("torchport.cli", {"torch", "rich", "yaml", "numpy", "pluggy", "torchport_cpu"}),
        ("torchport.cli.doctor", {"torch", "rich", "yaml", "numpy"}),
        ("torchport.cli.plugins", {"torch", "rich", "yaml", "numpy"}),
        ("torchport.cli.plan", {"torch", "rich", "yaml", "numpy"}),
        ("torchport.cli.new_plugin", {"torch", "rich", "yaml", "numpy"}),
        ("torchport.cli.conformance", {"torch", "rich", "yaml", "numpy", "pytest"}),
        ("torchport.testing.plugin", {"torch", "rich", "yaml", "numpy", "torchport.plan"}),
        ("torchport.builtin", {"torch", "rich", "yaml", "numpy", "torchport_cpu"}),
    ],
)
def test_importing_is_light(module, heavy):
    loaded = json.loads(run(f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert heavy & set(loaded) == set()


def test_a_launch_imports_only_what_it_needs(tmp_path):
    script = tmp_path / "script.py"
    script.touch()
    loaded = json.loads(
        run(
            "import json, os, sys\n"
            "def become(*command): print(json.dumps(sorted(sys.modules))); sys.stdout.flush(); os._exit(0)\n"
            "os.environ['TORCHPORT_PLUGINS'] = 'cpu'\n"
            "os.execvpe = become\n"
            f"sys.argv = ['torchport', 'launch', {str(script)!r}]\n"
            "from torchport.cli import main; main()"
        )
    )
    heavy = {
        "torch",
        "numpy",
        "rich",
        "yaml",
        "importlib.metadata",
        "packaging",
        "subprocess",
        "difflib",
        "tempfile",
    }
    own = {"torchport.config.plugins", "torchport.plugin.parallelism", "torchport.builtin.supervisor"}
    assert (heavy | own) & set(loaded) == set()
    assert {"torchport.builtin.local", "torchport_cpu"} <= set(loaded)


def test_public_names_are_listed_without_being_imported():
    code = "import sys, torchport; print('Accelerator' in dir(torchport), 'torch' in sys.modules)"
    assert run(code).split() == ["True", "False"]


def test_an_unknown_public_name_is_an_attribute_error():
    import torchport

    with pytest.raises(AttributeError, match="module 'torchport' has no attribute 'Accelerate'"):
        _ = torchport.Accelerate
