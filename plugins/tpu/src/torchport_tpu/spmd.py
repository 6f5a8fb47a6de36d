"""One program over all devices: the compiler of XLA spreads its tensors as parameters and batches are marked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torchport.errors import ConfigurationError
from torchport.plugin import Prepared, PrepareRequest, RunContext, Strategy, StrategySpec, bind_step

from torchport_tpu.config import SpmdPlugin

AXIS = "fsdp"
"""Name of the mesh's one axis; torch_xla's own `SpmdFullyShardedDataParallel` works on it too."""


class SpmdStrategy(Strategy):
    """Data parallelism over all devices of a process, written as if there were one device.

    A batch is that of all devices of the machine; its first dimension is spread over them. With `sharding="fsdp"`
    each parameter is spread along its longest dimension, and with it its gradient and the optimizer's state.
    Results, losses and checkpoints are those of one device: no process has to gather anything.
    """

    config: SpmdPlugin

    def __init__(self, spec: StrategySpec, config: SpmdPlugin | None = None) -> None:
        super().__init__(spec, config or SpmdPlugin())

    def prepare(self, request: PrepareRequest) -> Prepared:
        """Move models to the devices, mark their parameters, and bind them to the precision.

        Raises:
            ConfigurationError: if the runtime has started without virtual devices.
        """
        context = request.context
        if not xr.is_spmd():
            raise ConfigurationError(
                "the strategy 'spmd' needs the virtual device of torch_xla",
                reason="the runtime was started for another strategy before",
                hint="make the Accelerator with this strategy before any tensor is put on the device",
            )
        mesh = mesh_of_all_devices()
        models = []
        for model, place in zip(request.models, request.device_placement, strict=True):
            moved = model.to(context.device) if place else model
            self._mark(moved, mesh, context)
            models.append(context.precision.apply(moved, context))
        return bind_step(request, models)

    def _mark(self, model: torch.nn.Module, mesh: xs.Mesh, context: RunContext) -> None:
        if self.config.sharding != "fsdp":
            return
        for parameter in model.parameters():
            if parameter.device.type != context.device.type or parameter.ndim == 0:
                continue
            if parameter.numel() < self.config.min_num_params or _is_marked(parameter):
                continue
            axes: list[Any] = [None] * parameter.ndim
            axes[int(np.argmax(parameter.shape))] = AXIS
            xs.mark_sharding(parameter, mesh, tuple(axes))


def mesh_of_all_devices() -> xs.Mesh:
    """Return torch_xla's global mesh; if there is none, make it of all devices along one axis."""
    mesh = xs.get_global_mesh()
    if mesh is None:
        mesh = xs.get_1d_mesh(AXIS)
        xs.set_global_mesh(mesh)
    elif AXIS not in (mesh.axis_names or ()):
        raise ConfigurationError(
            f"the global mesh of torch_xla has no axis {AXIS!r}",
            found=str(mesh.axis_names),
            hint="name one so",
        )
    return mesh


def _is_marked(parameter: torch.Tensor) -> bool:
    """Whether a script has marked a parameter itself."""
    import torch_xla

    return bool(torch_xla._XLAC._get_xla_sharding_spec(parameter))
