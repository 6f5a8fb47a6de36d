"""Putting stubs where the vendor's packages would be, and taking them away again."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def known(device_type: str) -> bool:
    """Whether PyTorch knows a device type in this process."""
    try:
        torch.device(device_type)
    except RuntimeError:
        return False
    return True


def forget_modules() -> None:
    """Forget which module PyTorch has found for a device type; it keeps the answers."""
    forget = getattr(torch.get_device_module, "cache_clear", None)
    if forget is not None:
        forget()


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute, or take it away (`_GONE`), and restore it."""
    before = vars(owner).get(name, _GONE)
    _set(owner, name, value)
    try:
        yield
    finally:
        _set(owner, name, before)


_GONE = object()


def _set(owner: Any, name: str, value: Any) -> None:
    if value is not _GONE:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


@contextlib.contextmanager
def in_place(name: str, members: Mapping[str, Any], absent: Iterable[str]) -> Iterator[None]:
    """Replace members of a module that is loaded, and take others away."""
    module = sys.modules[name]
    with contextlib.ExitStack() as stack:
        for member, value in members.items():
            stack.enter_context(attribute(module, member, value))
        for member in absent:
            stack.enter_context(attribute(module, member, _GONE))
        yield


@contextlib.contextmanager
def beside(stub: types.ModuleType) -> Iterator[None]:
    """Put a module where it would be imported from, with the packages around it that are missing."""
    added: list[str] = []
    parts = stub.__name__.split(".")
    with contextlib.ExitStack() as stack:
        try:
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if depth < len(parts) and name in sys.modules:
                    continue
                module = stub if depth == len(parts) else types.ModuleType(name)
                module.__path__ = []  # a package: it may get modules of its own
                module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
                sys.modules[name] = module
                added.append(name)
                if depth > 1:
                    parent = sys.modules[".".join(parts[: depth - 1])]
                    stack.enter_context(attribute(parent, parts[depth - 1], module))
            yield
        finally:
            for name in added:
                sys.modules.pop(name, None)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(f"a stub has no files: {path!s}")


class _Finder(importlib.metadata.DistributionFinder):
    def __init__(self, distributions: Mapping[str, str]) -> None:
        self._distributions = distributions

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[_Distribution]:
        wanted = re.sub(r"[-_.]+", "-", context.name or "").lower() if context is not None else ""
        for name, version in self._distributions.items():
            if not wanted or re.sub(r"[-_.]+", "-", name).lower() == wanted:
                yield _Distribution(name, version)


@contextlib.contextmanager
def metadata(distributions: Mapping[str, str]) -> Iterator[None]:
    """Let installed metadata show distributions, versions by name."""
    finder = _Finder(distributions)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
