"""Devices that a vendor's package adds to PyTorch in the usual form: a module `torch.<device type>`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from torchport.plugin.backend import Backend
from torchport.plugin.specs import BackendSpec, Capabilities


class ModuleBackend(Backend):
    """A backend over the module that a vendor's package registers for its device type.

    It expects what PyTorch documents for such modules: `device_count`, `set_device`, memory figures, streams, random
    number states and `is_bf16_supported`. A subclass names the package, and overrides what its device does otherwise.

    Attributes:
        package: Name of the vendor's module. It is imported when the backend is chosen: PyTorch loads it by itself only
            where it asks for that (the entry points `torch.backends`) and `TORCH_DEVICE_BACKEND_AUTOLOAD` is not 0.
    """

    package: str = ""

    def __init__(self, spec: BackendSpec, config: Any = None) -> None:
        super().__init__(spec, config)
        importlib.import_module(self.package)

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this local rank, and make it the current one.

        Raises:
            LaunchError: if there are more processes than devices.
        """
        device = torch.device(self.spec.device_type, self.device_index(local_rank))
        self.module.set_device(device)
        return device

    def capabilities(self) -> Capabilities:
        """Declare autocast, loss scaling, pinned memory, streams and memory figures; bf16 where the module says so."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        bf16 = bool(getattr(self.module, "is_bf16_supported", bool)())
        return Capabilities(
            autocast=frozenset({"float16", "bfloat16"} if bf16 else {"float16"}),
            grad_scaler=True,
            pinned_memory=True,
            streams=True,
            memory_stats=True,
        )
