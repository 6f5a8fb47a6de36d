"""The documented utilities, under the names that users know; each is imported when it is first used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torchport.aliases import AVAILABILITY, PLUGIN_NAMES, RENAMED
from torchport.lazy import lazy_exports

_EXPORTS = {
    # settings
    "AutocastKwargs": "torchport.config.kwargs",
    "DataLoaderConfiguration": "torchport.config.kwargs",
    "DDPCommunicationHookType": "torchport.builtin.ddp_config",
    "DistributedDataParallelKwargs": "torchport.builtin.ddp_config",
    "GradScalerKwargs": "torchport.config.kwargs",
    "GradientAccumulationPlugin": "torchport.config.kwargs",
    "InitProcessGroupKwargs": "torchport.config.kwargs",
    "KwargsHandler": "torchport.config.kwargs",
    "ProfileKwargs": "torchport.config.kwargs",
    "ProjectConfiguration": "torchport.config.kwargs",
    "TorchDynamoPlugin": "torchport.config.dynamo",
    "ParallelismConfig": "torchport.plugin.parallelism",
    "SequenceParallelConfig": "torchport.plugin.parallelism",
    "TorchContextParallelConfig": "torchport.plugin.parallelism",
    "TorchTensorParallelConfig": "torchport.plugin.parallelism",
    # labels and errors
    "ComputeEnvironment": "torchport.labels",
    "DistributedOperationException": "torchport.errors",
    "DistributedType": "torchport.distributed_type",
    "DynamoBackend": "torchport.labels",
    "LoggerType": "torchport.labels",
    "PrecisionType": "torchport.labels",
    "RNGType": "torchport.labels",
    "SageMakerDistributedType": "torchport.labels",
    # nested structures of tensors
    "concatenate": "torchport.ops.pytree",
    "convert_outputs_to_fp32": "torchport.ops.pytree",
    "convert_to_fp32": "torchport.ops.pytree",
    "find_batch_size": "torchport.ops.pytree",
    "ignorant_find_batch_size": "torchport.ops.pytree",
    "merge_dicts": "torchport.ops.pytree",
    "honor_type": "torchport.ops.pytree",
    "listify": "torchport.ops.pytree",
    "recursively_apply": "torchport.ops.pytree",
    "send_to_device": "torchport.ops.pytree",
    "slice_tensors": "torchport.ops.pytree",
    # models
    "compile_regions": "torchport.training.compile",
    "extract_model_from_parallel": "torchport.unwrap",
    "has_compiled_regions": "torchport.training.compile",
    "is_compiled_module": "torchport.training.compile",
    # across processes
    "broadcast": "torchport.ops.exchange",
    "broadcast_object_list": "torchport.ops.exchange",
    "gather": "torchport.ops.exchange",
    "gather_object": "torchport.ops.exchange",
    "pad_across_processes": "torchport.ops.exchange",
    "reduce": "torchport.ops.exchange",
    "wait_for_everyone": "torchport.ops.exchange",
    # the device and its precision
    "get_grad_scaler": "torchport.training.precision",
    "get_mixed_precision_context_manager": "torchport.training.precision",
    "is_bf16_available": "torchport.environment",
    **dict.fromkeys(AVAILABILITY, "torchport.environment"),
    # the process and its environment
    "clear_environment": "torchport.environment",
    "compare_versions": "torchport.environment",
    "get_int_from_env": "torchport.environment",
    "is_port_in_use": "torchport.environment",
    "is_torch_version": "torchport.environment",
    "override_numa_affinity": "torchport.environment",
    "parse_choice_from_env": "torchport.environment",
    "parse_flag_from_env": "torchport.environment",
    "patch_environment": "torchport.environment",
    "purge_accelerate_environment": "torchport.environment",
    "set_numa_affinity": "torchport.environment",
    "str_to_bool": "torchport.environment",
    # memory and progress
    "clear_device_cache": "torchport.training.memory",
    "find_executable_batch_size": "torchport.training.memory",
    "release_memory": "torchport.training.memory",
    "tqdm": "torchport.progress",
    # random numbers
    "set_seed": "torchport.training.random",
    "synchronize_rng_state": "torchport.training.random",
    "synchronize_rng_states": "torchport.training.random",
    # weights and other objects in files
    "load": "torchport.checkpoint.model_folder",
    "load_checkpoint_in_model": "torchport.checkpoint.model_folder",
    "load_state_dict": "torchport.checkpoint.model_folder",
    "save": "torchport.checkpoint.model_folder",
    "SAFE_WEIGHTS_INDEX_NAME": "torchport.checkpoint.model_folder",
    "SAFE_WEIGHTS_NAME": "torchport.checkpoint.model_folder",
    "WEIGHTS_INDEX_NAME": "torchport.checkpoint.model_folder",
    "WEIGHTS_NAME": "torchport.checkpoint.model_folder",
    # file names inside a checkpoint
    "MODEL_NAME": "torchport.checkpoint.state",
    "OPTIMIZER_NAME": "torchport.checkpoint.state",
    "RNG_STATE_NAME": "torchport.checkpoint.state",
    "SCALER_NAME": "torchport.checkpoint.state",
    "SCHEDULER_NAME": "torchport.checkpoint.state",
}

__all__ = sorted(_EXPORTS)


def plugin_module(name: str) -> str | None:
    """Return the module of the plugin that brings a documented name; `None` if none is known to.

    Raises:
        ImportError: if that plugin is not installed.
    """
    plugin = PLUGIN_NAMES.get(name)
    if plugin is None:
        return None
    if importlib.util.find_spec(f"torchport_{plugin}") is None:
        raise ImportError(f"{name} comes with a plugin: pip install torchport-{plugin}")
    return f"torchport_{plugin}"


__getattr__: Callable[[str], Any] = lazy_exports(__name__, {**_EXPORTS, **RENAMED}, plugin_module)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
