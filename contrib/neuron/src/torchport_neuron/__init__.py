"""Torchport on AWS Trainium and Inferentia: the descriptor and the probe; imports neither torch nor a runtime."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torchport.plugin import BackendSpec, Probe, hookimpl

VISIBLE = "NEURON_RT_VISIBLE_CORES"
DEVICES = "/dev"


@hookimpl
def torchport_backends() -> Iterable[BackendSpec]:
    """Offer NeuronCores, which torch_xla drives through PJRT."""
    yield BackendSpec(
        name="neuron",
        factory="torchport_neuron.backend:NeuronBackend",
        probe="torchport_neuron:probe",
        summary="AWS Trainium and Inferentia, through torch_neuronx",
        device_type="xla",
        priority=100,
        collectives="xla",
        runtime=("torch-neuronx", "torch-xla"),
        visible_devices_env=VISIBLE,
        distributed_type="XLA",
    )


def probe() -> Probe:
    """Count the NeuronCores that this process may use, from device files and variables alone."""
    chosen = os.environ.get("PJRT_DEVICE", "NEURON").upper()
    if chosen != "NEURON":
        return Probe(available=False, reason=f"PJRT_DEVICE={chosen} names another device: unset it")
    from pathlib import Path

    chips = sorted(path.name for path in Path(DEVICES).glob("neuron[0-9]*"))
    if not chips:
        return Probe(
            available=False, reason="no Neuron device in /dev: is this a Trn or Inf2 instance? (neuron-ls)"
        )
    try:
        count = _count(os.environ)
    except ValueError:
        return Probe(available=False, reason=f"{VISIBLE}={os.environ.get(VISIBLE)!r}: write 0,1 or 0-3")
    return Probe(available=True, count=count or len(chips), details={"devices": str(len(chips))})


def _count(environ: os._Environ[str]) -> int:
    """Return the number of cores that the runtime's variables name; 0 if they name none."""
    text = environ.get(VISIBLE, "")
    if not text:
        return int(environ.get("NEURON_RT_NUM_CORES", "0"))
    count = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count
