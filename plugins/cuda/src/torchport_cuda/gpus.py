"""NVIDIA GPUs as NVML (nvidia-ml-py) and the driver tell of them, without initialising CUDA. Imports no torch.

CUDA in a process breaks all that are forked from it; NVML does not.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any, NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SWITCHES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
_CONSUMER = re.compile(r"GeForce RTX (?:3090|40\d0|50\d0)\b")
_DRIVER = "/proc/driver/nvidia/gpus"


class Gpu(NamedTuple):
    """A visible GPU or MIG instance; the cores are those of the nearest NUMA node."""

    name: str
    capability: tuple[int, int]
    cores: list[int]


def visible_gpus() -> list[Gpu] | None:
    """Return what CUDA would show this process, in its order; `None` without nvidia-ml-py or a driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return [_describe(nvml, handle) for handle in _visible(nvml)]
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any) -> list[Any]:
    """Read the variable as CUDA does: an entry that names nothing ends the list, a repeated one empties it."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    entries = os.environ.get(VISIBLE, ",".join(str(index) for index in range(len(handles)))).split(",")
    chosen: dict[str, Any] = {}
    for entry in map(str.strip, entries):
        if entry.startswith("MIG-"):
            try:
                found = [nvml.nvmlDeviceGetHandleByUUID(entry)]
            except nvml.NVMLError:
                break
        elif entry.startswith("GPU-"):
            found = [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(entry)]
        else:
            found = handles[int(entry) : int(entry) + 1] if entry.isdigit() else []
        if len(found) != 1:
            break
        uuid = _text(nvml.nvmlDeviceGetUUID(found[0]))
        if uuid in chosen:
            return []
        chosen[uuid] = found[0]
    return list(chosen.values())


def _describe(nvml: Any, handle: Any) -> Gpu:
    if _text(nvml.nvmlDeviceGetUUID(handle)).startswith("MIG-"):
        handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    words = nvml.nvmlDeviceGetCpuAffinity(handle, ((os.cpu_count() or 1) + 63) // 64)
    cores = [64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1]
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), (major, minor), cores)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older releases return bytes


def unset_switches() -> list[str]:
    """Return the variables that switch off what consumer cards do not have, as far as they are not set."""
    return [name for name in _SWITCHES if name not in os.environ]


def consumer_card() -> str:
    """Return the name of a consumer card: NCCL must not try peer-to-peer or InfiniBand on it. Empty if none."""
    gpus = visible_gpus()
    if gpus is None:  # the driver tells of all GPUs of this machine
        from pathlib import Path

        models = [path.read_text() for path in sorted(Path(_DRIVER).glob("*/information"))]
        names = [line.removeprefix("Model:").strip() for text in models for line in text.splitlines()]
    else:
        names = [gpu.name for gpu in gpus]
    return next((name for name in names if _CONSUMER.search(name)), "")
