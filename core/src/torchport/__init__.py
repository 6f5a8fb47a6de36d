"""Torchport: one PyTorch script, any accelerator, any sharding strategy.

Names are imported when they are first used, so that `import torchport` imports neither torch nor plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchport.lazy import lazy_exports

if TYPE_CHECKING:
    from torchport.accelerator import Accelerator
    from torchport.builtin.ddp_config import DDPCommunicationHookType, DistributedDataParallelKwargs
    from torchport.checkpoint.model_folder import load_checkpoint_in_model
    from torchport.checkpoint.resume import Progress
    from torchport.config.dynamo import TorchDynamoPlugin
    from torchport.config.kwargs import (
        AutocastKwargs,
        DataLoaderConfiguration,
        GradientAccumulationPlugin,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
        ProjectConfiguration,
    )
    from torchport.data.prepare import skip_first_batches
    from torchport.distributed_type import DistributedType
    from torchport.errors import TorchportError
    from torchport.inference import prepare_pippy
    from torchport.launchers import debug_launcher, notebook_launcher
    from torchport.plugin.parallelism import ParallelismConfig
    from torchport.state import AcceleratorState, GradientState, PartialState
    from torchport.training.local_sgd import LocalSGD
    from torchport.training.memory import find_executable_batch_size
    from torchport.training.random import set_seed

__version__ = "0.1.0"

_EXPORTS = {
    "Accelerator": "torchport.accelerator",
    "AcceleratorState": "torchport.state",
    "AutocastKwargs": "torchport.config.kwargs",
    "DDPCommunicationHookType": "torchport.builtin.ddp_config",
    "DataLoaderConfiguration": "torchport.config.kwargs",
    "DistributedDataParallelKwargs": "torchport.builtin.ddp_config",
    "DistributedType": "torchport.distributed_type",
    "GradScalerKwargs": "torchport.config.kwargs",
    "GradientAccumulationPlugin": "torchport.config.kwargs",
    "GradientState": "torchport.state",
    "InitProcessGroupKwargs": "torchport.config.kwargs",
    "LocalSGD": "torchport.training.local_sgd",
    "ParallelismConfig": "torchport.plugin.parallelism",
    "PartialState": "torchport.state",
    "ProfileKwargs": "torchport.config.kwargs",
    "Progress": "torchport.checkpoint.resume",
    "ProjectConfiguration": "torchport.config.kwargs",
    "TorchDynamoPlugin": "torchport.config.dynamo",
    "TorchportError": "torchport.errors",
    "debug_launcher": "torchport.launchers",
    "find_executable_batch_size": "torchport.training.memory",
    "load_checkpoint_in_model": "torchport.checkpoint.model_folder",
    "notebook_launcher": "torchport.launchers",
    "prepare_pippy": "torchport.inference",
    "set_seed": "torchport.training.random",
    "skip_first_batches": "torchport.data.prepare",
}
"""Public names and the modules that define them."""

__all__ = [
    "Accelerator",
    "AcceleratorState",
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "GradientState",
    "InitProcessGroupKwargs",
    "LocalSGD",
    "ParallelismConfig",
    "PartialState",
    "ProfileKwargs",
    "Progress",
    "ProjectConfiguration",
    "TorchDynamoPlugin",
    "TorchportError",
    "__version__",
    "debug_launcher",
    "find_executable_batch_size",
    "load_checkpoint_in_model",
    "notebook_launcher",
    "prepare_pippy",
    "set_seed",
    "skip_first_batches",
]


def _of_a_plugin(name: str) -> str | None:
    if not name[:1].isupper():  # no class: it may be a submodule being imported
        return None
    from torchport.utils import plugin_module

    return plugin_module(name)


__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS, _of_a_plugin)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
