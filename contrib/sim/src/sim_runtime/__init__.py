"""What a vendor ships: a device type for PyTorch, `sim`, whose devices are simulated in the memory of the host.

It knows nothing of Torchport. Importing it imports neither torch nor the extension; `load` does, once:

| variable | meaning |
| --- | --- |
| `SIM_DEVICE_COUNT` | how many devices the machine has; none unless it is set |
| `SIM_VISIBLE_DEVICES` | which of them this process sees, as in `0,2`; all unless it is set |
| `SIM_MEMORY_LIMIT` | memory of each device, in bytes or as in `512MiB`; that of the host unless it is set |
"""

from __future__ import annotations

import importlib.machinery
import os
import re
from pathlib import Path
from typing import Any

MOST_DEVICES = 64

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

_extension: Any = None


class DeviceError(RuntimeError):
    """There are no devices, with the reason."""


def visible_devices() -> list[int]:
    """Return the numbers of the devices that this process may see, from the environment alone.

    Raises:
        DeviceError: if there is none, or a variable cannot be read.
    """
    text = os.environ.get("SIM_DEVICE_COUNT", "")
    if not text:
        raise DeviceError("SIM_DEVICE_COUNT is not set: export SIM_DEVICE_COUNT=4 simulates four devices")
    if not (text.isdigit() and 0 < int(text) <= MOST_DEVICES):
        raise DeviceError(f"SIM_DEVICE_COUNT={text!r} is not a number from 1 to {MOST_DEVICES}")
    numbers = os.environ.get("SIM_VISIBLE_DEVICES")
    if numbers is None:
        return list(range(int(text)))
    visible = [number.strip() for number in numbers.split(",") if number.strip()]
    for number in visible:
        if not (number.isdigit() and int(number) < int(text)) or visible.count(number) > 1:
            raise DeviceError(
                f"SIM_VISIBLE_DEVICES={numbers!r} does not list different devices from 0 to {int(text) - 1}"
                f" (SIM_DEVICE_COUNT={text})"
            )
    if not visible:
        raise DeviceError("SIM_VISIBLE_DEVICES is empty: it hides all devices")
    return [int(number) for number in visible]


def memory_limit() -> int:
    """Return the memory of each device, in bytes.

    Raises:
        DeviceError: if the variable cannot be read.
    """
    text = os.environ.get("SIM_MEMORY_LIMIT", "")
    if not text:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise DeviceError(f"SIM_MEMORY_LIMIT={text!r} is not a number of bytes: 512MiB, for example")
    return int(float(found[1]) * _UNITS[found[2]])


def built() -> bool:
    """Whether the extension has been compiled for this Python."""
    folder = Path(__file__).parent
    return any((folder / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def load() -> Any:
    """Load the extension, register the device type with PyTorch, and return the extension; later calls do nothing.

    Raises:
        DeviceError: if there are no devices, the extension is not built or was built for another PyTorch, or another
            device type has taken the one place that PyTorch has for those from outside of it.
    """
    if _extension is None:
        _load()
    return _extension


def _load() -> None:
    global _extension
    visible, limit = visible_devices(), memory_limit()
    if not built():
        raise DeviceError(
            "its extension has not been compiled: pip install --no-build-isolation torchport-sim,"
            " with a C++ compiler"
        )
    import torch
    from torch.utils import backend_registration

    if _extension is not None:  # importing torch has loaded it: `autoload`
        return
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", "sim"):
        raise DeviceError(
            f"the device type {taken!r} has taken PyTorch's one place for devices from outside (PrivateUse1):"
            " only one of the two can be used in a process"
        )
    try:
        from sim_runtime import _C  # its static initialisers register kernels, allocator, guard and hooks
    except ImportError as error:
        raise DeviceError(f"its extension was compiled for another PyTorch: {error}") from error
    _C.configure([limit] * len(visible))
    backend_registration.rename_privateuse1_backend("sim")
    from sim_runtime import device_module, distributed

    torch._register_device_module("sim", device_module)  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
    distributed.register()
    _extension = _C


def autoload() -> None:
    """Load the devices that are asked for; called by `import torch`, which must not fail because of them."""
    try:
        load()
    except DeviceError:
        return
