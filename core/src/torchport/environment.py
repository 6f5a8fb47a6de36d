"""What the process and the machine around the script are like, and temporary changes of the environment."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from torchport import aliases
from torchport.errors import ConfigurationError
from torchport.plan.discovery import discover
from torchport.runtime import Runtime, current_topology

T = TypeVar("T")

_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")

# --- variables ---------------------------------------------------------------------------------------------


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Set environment variables in a `with` block, under their names in upper case, and restore them after it."""
    names = {name.upper(): str(value) for name, value in kwargs.items()}
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def clear_environment() -> Iterator[None]:
    """Take all environment variables away in a `with` block, and restore them after it."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def purge_accelerate_environment(func_or_cls: T) -> T:
    """Decorate a function, or the methods of a class, to take back the Torchport variables that it sets.

    Variables that begin with `TORCHPORT_` or `ACCELERATE_` are after a call as they were before it, also when it
    raises; others stay as the call leaves them.
    """
    if inspect.isclass(func_or_cls):
        for name, method in list(vars(func_or_cls).items()):
            if inspect.isfunction(method):
                setattr(func_or_cls, name, _purged(method))
        return func_or_cls
    purged: T = _purged(func_or_cls)
    return purged


def _purged(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _own_variables()
        try:
            return function(*args, **kwargs)
        finally:
            for name in _own_variables().keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)

    return run


def _own_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(aliases.PURGED)}


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Convert a text that means yes or no to 1 or 0, or (`to_bool`) to `True` or `False`.

    Raises:
        ConfigurationError: if it means neither.
    """
    text = str(value).strip().lower()
    if text not in (*_YES, *_NO):
        raise ConfigurationError(f"{value!r} means neither yes nor no", hint="true or false")
    return text in _YES if to_bool else int(text in _YES)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Return what an environment variable means, yes or no; `default` if it is not set."""
    return bool(str_to_bool(os.environ.get(key, str(default)), to_bool=True))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """Return the text of an environment variable; `default` if it is not set."""
    return os.environ.get(key, default)


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """Return the first number from 0 that one of some environment variables holds; `default` if none does."""
    for key in env_keys:
        text = os.environ.get(key, "").strip()
        if text.isdigit():
            return int(text)
    return default


# --- what is there -----------------------------------------------------------------------------------------


def is_port_in_use(port: int | str | None = None) -> bool:
    """Whether something listens on a TCP port of this machine; 29500 unless told otherwise."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(("localhost", 29500 if port is None else int(port))) == 0


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">": lambda a, b: a > b, ">=": lambda a, b: a >= b, "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b,
}  # fmt: skip


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Compare the version of an installed distribution, or a version, with another.

    Args:
        library_or_version: Name of a distribution, or a `packaging.version.Version`.
        operation: `">"`, `">="`, `"=="`, `"!="`, `"<="` or `"<"`.
        requirement_version: The other version.

    Raises:
        ConfigurationError: if the operation is not known.
        importlib.metadata.PackageNotFoundError: if the distribution is not installed.
    """
    from packaging.version import Version, parse

    if operation not in _COMPARE:
        raise ConfigurationError(
            f"{operation!r} does not compare versions", hint=f"one of {', '.join(_COMPARE)}"
        )
    found = library_or_version
    if not isinstance(found, Version):
        found = parse(importlib.metadata.version(found))
    return _COMPARE[operation](found, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Compare the version of PyTorch with another; see `compare_versions`."""
    from packaging.version import parse

    return compare_versions(parse(parse(torch.__version__).base_version), operation, version)


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether the run's device, or else the one that PyTorch would choose, computes in bfloat16.

    Args:
        ignore_tpu: Accepted for compatibility: the device's own backend answers.
    """
    if Runtime.current is not None:
        return "bfloat16" in Runtime.current.backend.capabilities().autocast
    supported = getattr(torch.get_device_module(), "is_bf16_supported", None)
    return True if supported is None else bool(supported())


def availability(name: str) -> Callable[..., bool]:
    """Return the documented check of this name: whether a package can be imported, or a device be used."""
    asked = aliases.AVAILABILITY[name]
    defaults = dict(asked.parameters)

    def check(*args: Any, **kwargs: Any) -> bool:
        given = check.__signature__.bind(*args, **kwargs)  # type: ignore[attr-defined]
        if asked.package and importlib.util.find_spec(asked.package) is None:
            return False
        if asked.device and not _has_device(asked.device):
            return False
        return _meets({**defaults, **given.arguments})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    check.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, kind, default=value) for key, value in defaults.items()],
        return_annotation=bool,
    )
    what = f"the package `{asked.package}` is installed" if asked.package else "such a device can be used"
    check.__name__ = check.__qualname__ = name
    check.__doc__ = f"Whether {what}."
    return check


def __getattr__(name: str) -> Any:
    """Make a documented check when it is first used."""
    if name not in aliases.AVAILABILITY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = availability(name)
    return globals()[name]


def _has_device(name: str) -> bool:
    """Ask the installed backend of this name; without one, PyTorch."""
    installed = discover(os.environ)
    for spec in installed.specs("backend"):
        if name in (spec.name, *spec.aliases):
            return installed.probe(spec).available
    module = getattr(torch, name, None) or getattr(torch.backends, name, None)
    is_available = getattr(module, "is_available", None)
    return bool(is_available()) if is_available is not None else False


def _meets(parameters: Mapping[str, Any]) -> bool:
    """Whether the further conditions of a check hold: a version of PyTorch, a kind of device."""
    if "min_version" in parameters and not is_torch_version(">=", parameters["min_version"]):
        return False
    wanted = [key.removeprefix("check_is_") for key, value in parameters.items() if value and "_is_" in key]
    return not wanted or any(_has_device(name) for name in wanted)


# --- processor cores ---------------------------------------------------------------------------------------


def override_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Bind this process to the processor cores that are nearest to its device.

    Args:
        local_process_index: Index of this process on its machine.
        verbose: Whether to print the cores; by default no.

    Raises:
        ConfigurationError: if no run is open yet, so that the device is not known.
    """
    runtime = Runtime.current
    if runtime is None:
        raise ConfigurationError(
            "the device of this process is not known yet",
            hint="PartialState() before it, or --enable-cpu-affinity",
        )
    runtime.backend.bind_cpu(replace(current_topology(), local_rank=local_process_index))
    if verbose and hasattr(os, "sched_getaffinity"):
        print(f"process {local_process_index} runs on cores {sorted(os.sched_getaffinity(0))}")  # noqa: T201


@functools.lru_cache
def set_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Bind this process to the processor cores that are nearest to its device, once; see `override_numa_affinity`."""
    override_numa_affinity(local_process_index, verbose)
