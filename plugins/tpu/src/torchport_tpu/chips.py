"""Which TPU chips there are. Imports neither torch nor a runtime, and initialises nothing."""

from __future__ import annotations

import os

from torchport.plugin import Probe

PCI_DEVICES = "/sys/bus/pci/devices"

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

NO_CHIP = "no TPU chip is attached to the PCI bus of this machine (is this a TPU virtual machine?)"
"""Why there is no TPU."""


def attached() -> list[str]:
    """Return the generation of each TPU chip that the PCI bus lists."""
    from pathlib import Path

    found = []
    for vendor in sorted(Path(PCI_DEVICES).glob("*/vendor")):
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
    return _probe_chips()


def probe_xla() -> Probe:
    """Say whether torch_xla would find the device that `PJRT_DEVICE` names, or else a TPU."""
    device = os.environ.get("PJRT_DEVICE", "TPU").upper()
    if device == "TPU":
        return _probe_chips()
    asked = os.environ.get(f"{device}_NUM_DEVICES", "")
    count = int(asked) if asked.isdigit() else 1
    if device == "CPU":
        # Several processes cannot work together on it: one process has all of these.
        return Probe(available=True, count=1, details={"PJRT_DEVICE": device, "virtual devices": str(count)})
    return Probe(available=True, count=count, details={"PJRT_DEVICE": device})


def _probe_chips() -> Probe:
    names = attached()
    if not names:
        return Probe(
            available=False, reason=f"{NO_CHIP}; for another device set PJRT_DEVICE, such as PJRT_DEVICE=CPU"
        )
    visible = os.environ.get("TPU_VISIBLE_CHIPS") or os.environ.get("TPU_VISIBLE_DEVICES") or ""
    count = len([part for part in visible.split(",") if part.strip()]) or len(names)
    return Probe(available=True, count=count, details={"chips": ", ".join(sorted(set(names)))})
