"""What probes ask: what is installed, how PyTorch was built, and whether a vendor's module shows devices."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torchport.plugin import distributions
from torchport.plugin.requirements import plain_name, plainly_met
from torchport.plugin.specs import Probe

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def missing_runtime(requirements: Iterable[str]) -> str:
    """Name the requirements that installed metadata does not meet, in words; empty if all are met.

    Args:
        requirements: Requirements as of PEP 508, such as those of a descriptor's `runtime`.
    """
    return "; ".join(filter(None, map(_missing, requirements)))


def _missing(text: str) -> str:
    """Say why a requirement is not met; `packaging`, which is slow to import, judges those that are not plain."""
    name, requirement = plain_name(text), None
    if not name:
        requirement = _parsed(text)
        name = requirement.name
        if requirement.marker is not None and not requirement.marker.evaluate():
            return ""
    version = distributions.version_of(name)
    if version is None:
        return f"needs {text}, which is not installed: pip install '{text}'"
    met = plainly_met(text, version)
    if met is None:
        met = (requirement or _parsed(text)).specifier.contains(version, prereleases=True)
    return "" if met else f"needs {text}, found {name} {version}: pip install --upgrade '{text}'"


def _parsed(text: str) -> Requirement:
    from packaging.requirements import Requirement

    return Requirement(text)


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
        with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError):
        return MappingProxyType({})
    found: dict[str, str] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, str)):
            found |= {target.id: value.value or "" for target in targets if isinstance(target, ast.Name)}
    return MappingProxyType(found)


def probe_module(package: str, device_type: str, *, visible: str, needs: str, tool: str) -> Probe:
    """Probe devices that a vendor's package adds to PyTorch as the module `torch.<device type>`.

    Counting does not initialise the vendor's runtime.

    Args:
        package: Name of the vendor's module, which is imported.
        device_type: The type of its devices.
        visible: The variable that says which devices a process can see.
        needs: What the package needs beside itself, for the case that it cannot be loaded.
        tool: The vendor's command that lists devices, for the case that there is none.

    Returns:
        The number of devices, or why there is none.
    """
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Probe(available=False, reason=f"{package} cannot be loaded: {why}; it needs {needs}")
    import torch

    count = int(torch.get_device_module(device_type).device_count())
    if count:
        return Probe(available=True, count=count)
    if visible in os.environ:
        reason = f"no device is visible with {visible}={os.environ[visible]!r}: unset it, or name one"
    else:
        reason = f"no device answers: is there one, and is its driver installed? ({tool})"
    return Probe(available=False, reason=reason)
