"""Seeds, and random states that are the same on every process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from torchport.errors import ConfigurationError
from torchport.ops import exchange
from torchport.runtime import Runtime, current_topology

RNG_TYPES = ("torch", "device", "generator", "python", "numpy")
"""Random number generators that can be synchronized; the name of a device type means its own."""


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python's, NumPy's, PyTorch's and the device's generators.

    Args:
        seed: The seed.
        device_specific: Whether each process adds its index to it.
        deterministic: Whether PyTorch must use deterministic algorithms
            (`torch.use_deterministic_algorithms`).
    """
    runtime = Runtime.current
    if device_specific:
        seed += current_topology().rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if runtime is not None:
        runtime.backend.seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def check_rng_types(rng_types: Iterable[str], device: torch.device) -> tuple[str, ...]:
    """Return types of generators as texts.

    Raises:
        ConfigurationError: for one that is neither among `RNG_TYPES` nor the type of the run's device.
    """
    kinds = tuple(str(getattr(kind, "value", kind)) for kind in rng_types)
    for kind in kinds:
        if kind not in (*RNG_TYPES, device.type):
            raise ConfigurationError(
                f"{kind!r} is not a type of generator", hint=f"one of {', '.join(RNG_TYPES)}"
            )
    return kinds


def synchronize_rng_state(rng_type: str | None = None, generator: torch.Generator | None = None) -> None:
    """Give every process the random state of the main process.

    Args:
        rng_type: One of `RNG_TYPES`, or the type of the run's device.
        generator: The generator that `"generator"` means.
    """
    runtime = Runtime.current
    kind = str(getattr(rng_type, "value", rng_type))
    if runtime is not None and kind == runtime.device.type and kind not in RNG_TYPES:
        kind = "device"
    if kind not in RNG_TYPES:
        raise ConfigurationError(
            f"{kind!r} is not a type of generator", hint=f"one of {', '.join(RNG_TYPES)}"
        )
    if runtime is None or runtime.topology.world_size == 1:
        return
    if kind == "python":
        random.setstate(_same(random.getstate()))
    elif kind == "numpy":
        np.random.set_state(_same(np.random.get_state()))
    elif kind == "torch":
        torch.set_rng_state(_same(torch.get_rng_state()))
    elif kind == "device":
        runtime.backend.set_rng_state(_same(runtime.backend.rng_state(runtime.device)), runtime.device)
    elif generator is not None:
        generator.set_state(_same(generator.get_state()))


def synchronize_rng_states(rng_types: Iterable[str], generator: torch.Generator | None = None) -> None:
    """Give every process the random states of the main process, for several types of generator."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator)


def rng_states(runtime: Runtime) -> dict[str, Any]:
    """Return the states of all generators of this process, as tensors and plain values."""
    device = {"device": runtime.backend.rng_state(runtime.device), "device_type": runtime.device.type}
    return host_rng_states() | device


def host_rng_states() -> dict[str, Any]:
    """Return the states of the generators of this process but the device's, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), words_of_numpy, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }  # fmt: skip


def set_rng_states(states: dict[str, Any], runtime: Runtime) -> None:
    """Restore what `rng_states` returned.

    The generator of another type of device than that of this run cannot take the saved state: it is seeded, with
    `derived_seed`.
    """
    if states.get("device_type", runtime.device.type) != runtime.device.type:
        runtime.backend.seed(derived_seed(states, runtime.topology.rank))
        set_host_rng_states(states)
        return
    set_host_rng_states(states)
    runtime.backend.set_rng_state(states["device"], runtime.device)


def derived_seed(states: dict[str, Any], rank: int) -> int:
    """Return the seed of a generator whose state was not saved.

    It is the first 8 bytes of the SHA-256 of a saved state of PyTorch's generator and the rank: the same checkpoint
    gives the same random numbers each time, and each process others.

    Args:
        states: What `rng_states` returned.
        rank: The rank of this process.
    """
    saved = states["torch"].numpy().tobytes()
    digest = hashlib.sha256(saved + rank.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def set_host_rng_states(states: dict[str, Any]) -> None:
    """Restore what `host_rng_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])


def _same(state: Any) -> Any:
    return exchange.broadcast_object_list([state])[0]
