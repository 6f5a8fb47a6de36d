"""One program over all devices: the compiler of XLA spreads its tensors as parameters and batches are marked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torchport.errors import ConfigurationError, LaunchError
from torchport.plugin import Prepared, PrepareRequest, RunContext, Strategy, StrategySpec, Topology, bind_step

from torchport_tpu.spmd_config import SpmdPlugin

AXIS = "fsdp"
"""Name of the mesh's one axis; torch_xla's own `SpmdFullyShardedDataParallel` works on it too."""


def start_process(topology: Topology) -> None:
    """Let the runtime begin with virtual devices, which it must know before its first tensor.

    Raises:
        LaunchError: if there are several processes on this machine.
    """
    if topology.local_world_size > 1:
        raise LaunchError(
            "the strategy 'spmd' takes one process for all devices of a machine",
            found=f"{topology.local_world_size} processes on this machine, from {topology.source}",
            hint="--num-processes 1 on one machine, or the number of machines of a pod",
        )
    if not xr.is_spmd():
        xr.use_spmd()


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
        """Move models to the devices, mark their parameters, bind them to the precision, and spread batches.

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
        context.backend.batch_sharding = BatchSharding(mesh)  # type: ignore[attr-defined]
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


class BatchSharding:
    """How tensors of any number of dimensions are spread: the first over the first axis of a mesh.

    Args:
        mesh: The devices. Where several machines have a part each, a batch is the part of its machine.
    """

    def __init__(self, mesh: xs.Mesh) -> None:
        self.mesh = mesh
        self.minibatch = xr.process_count() > 1
        self._specs: dict[int, Any] = {}

    def xla_spec(self, tensor: torch.Tensor) -> Any:
        """Return the specification of one tensor; a number is held whole on every device."""
        if tensor.ndim not in self._specs:
            axes = (self.mesh.axis_names[0], *[None] * (tensor.ndim - 1)) if tensor.ndim else None
            self._specs[tensor.ndim] = axes and xs.ShardingSpec(self.mesh, axes, minibatch=self.minibatch)
        spec = self._specs[tensor.ndim]
        return None if spec is None else spec.xla_spec(tensor)


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
