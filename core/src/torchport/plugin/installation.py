"""What can be told of the installed PyTorch without importing it, for probes."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


@functools.cache
def torch_build() -> Mapping[str, str]:
    """Return what PyTorch says it was built with, by name, without importing it (which takes seconds).

    These are the names and values of `torch.version`: `"__version__"`, and the version of each vendor's toolkit, empty
    where PyTorch was built without it. Empty if PyTorch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return MappingProxyType({})
    try:
        tree = ast.parse(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return MappingProxyType({})
    found: dict[str, str] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, str)):
            found |= {target.id: value.value or "" for target in targets if isinstance(target, ast.Name)}
    return MappingProxyType(found)
