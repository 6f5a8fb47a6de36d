"""Which TPU chips and which runtimes there are. Imports neither torch nor a runtime, and initialises nothing."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from torchport.plugin import Probe

PCI_DEVICES = Path("/sys/bus/pci/devices")

_GOOGLE = "0x1ae0"
_GENERATIONS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU v7",
}
"""Names by PCI device identifier, as torch_xla and torch_tpu list them."""

_CHIPS = "no TPU chip is attached to the PCI bus of this machine"


def runtime() -> str:
    """Return the installed runtime for TPUs, `"torch_tpu"` before `"torch_xla"`; empty if there is none."""
    for distribution, module in (("torch-tpu", "torch_tpu"), ("torch-xla", "torch_xla")):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return module
    return ""


def attached() -> list[str]:
    """Return the generation of each TPU chip that the PCI bus lists."""
    found = []
    for vendor in sorted(PCI_DEVICES.glob("*/vendor")):
        try:
            if vendor.read_text().strip() == _GOOGLE:
                name = _GENERATIONS.get((vendor.parent / "device").read_text().strip())
                found += [name] if name else []
        except OSError:
            continue
    return found


def probe_tpu_over_xla() -> Probe:
    """Say whether torch_xla would work on TPU chips of this machine."""
    device = os.environ.get("PJRT_DEVICE", "TPU").upper()
    if device != "TPU":
        return Probe(
            available=False, reason=f"PJRT_DEVICE={device}: the backend 'xla' works on it; unset it for TPU"
        )
    return _chips(attached(), os.environ)


def probe_xla() -> Probe:
    """Say whether torch_xla would find the device that `PJRT_DEVICE` names, or else a TPU."""
    device = os.environ.get("PJRT_DEVICE", "").upper()
    if device == "CPU":
        count = _number(os.environ, "CPU_NUM_DEVICES") or 1
        # Several processes cannot work together on it: one process has all of these.
        return Probe(available=True, count=1, details={"PJRT_DEVICE": device, "virtual devices": str(count)})
    if device not in ("", "TPU"):
        count = _number(os.environ, f"{device}_NUM_DEVICES") or 1
        return Probe(available=True, count=count, details={"PJRT_DEVICE": device})
    found = _chips(attached(), os.environ)
    if found.available or device == "TPU":
        return found
    return Probe(
        available=False, reason=f"{_CHIPS}; for another device set PJRT_DEVICE, such as PJRT_DEVICE=CPU"
    )


def _chips(names: list[str], environ: Mapping[str, str]) -> Probe:
    if not names:
        return Probe(available=False, reason=f"{_CHIPS} (is this a TPU virtual machine?)")
    visible = environ.get("TPU_VISIBLE_CHIPS") or environ.get("TPU_VISIBLE_DEVICES") or ""
    count = len([part for part in visible.split(",") if part.strip()]) or len(names)
    return Probe(available=True, count=count, details={"chips": ", ".join(sorted(set(names)))})


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0
