"""Documented older spellings, as tables from spelling to slot. The only core file that names vendors.

The names and their meaning are those of the public command line, YAML files and environment variables of
Accelerate 1.9. Nothing here is code that acts on a name: readers look spellings up and go on with the slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torchport import envvars
from torchport.errors import ConfigurationError


class Inert(NamedTuple):
    """A documented key that means nothing here; other values than these ask for something that is not done.

    Attributes:
        accepted: The values that ask for nothing, lower-case.
        instead: What to use for the rest; empty if a plugin reads them.
    """

    accepted: tuple[str, ...]
    instead: str


# --- command line of `torchport launch` ---

FLAGS: Mapping[str, str] = {
    "mixed-precision": "precision",
    "gpu-ids": "device_ids",
    "mpirun-hostfile": "host_file",
}
"""Flags that take a value: the setting they are another name of."""

SWITCHES: Mapping[str, Mapping[str, str]] = {
    "cpu": {"backend": "cpu"},
    "multi-gpu": {"backend": "cuda"},
    "tpu": {"backend": "tpu"},
    "use-fsdp": {"strategy": "fsdp"},
    "use-deepspeed": {"strategy": "deepspeed"},
    "use-megatron-lm": {"strategy": "megatron"},
}
"""Flags without a value: the slots they fill."""

RETIRED_SWITCHES: Mapping[str, str] = {
    "ipex": "PyTorch's own support for the device is used; choose it with --backend",
    "use-xpu": "the device is found by itself; choose it with --backend xpu",
}
"""Flags documented as deprecated and without effect: what to write instead."""

INERT_FLAGS: Mapping[str, Inert] = {
    "main-training-function": Inert(("main",), "the script is run as a whole"),
}
"""Flags that take a value and ask for nothing with these."""

COMMANDS: Mapping[str, str] = {
    "config": "write the YAML file by hand, with the keys of docs/environment.md;"
    " `torchport plan --config-file FILE` checks it",
    "env": "`torchport doctor` shows versions, devices and what is wrong with them",
    "estimate-memory": "nothing estimates memory beforehand; the nearest is `torchport plan`, which shows the"
    " strategies that could shard the model",
    "test": "`torchport plan` shows what a script would get here, and `torchport conformance cpu` proves that"
    " a plugin works",
}
"""Documented commands that do not exist: what does the nearest to each."""

# --- YAML ---

YAML_KEYS: Mapping[str, str] = {
    "mixed_precision": "precision",
    "gpu_ids": "device_ids",
    "mpirun_hostfile": "host_file",
}
"""Keys that are another name of a setting."""

YAML_SECTIONS: Mapping[str, str] = {"dynamo_backend": "dynamo_config"}
"""Keys at the top of the file that belong into a section: which."""

YAML_SWITCHES: Mapping[str, Mapping[str, str]] = {"use_cpu": {"backend": "cpu"}}
"""Keys that, when true, fill slots."""

DISTRIBUTED_TYPE_SLOTS: Mapping[str, Mapping[str, str]] = {
    "NO": {},
    "MULTI_CPU": {"backend": "cpu"},
    "MULTI_GPU": {"backend": "cuda"},
    "MULTI_XPU": {"backend": "xpu"},
    "MULTI_HPU": {"backend": "hpu"},
    "MULTI_NPU": {"backend": "npu"},
    "MULTI_MLU": {"backend": "mlu"},
    "MULTI_SDAA": {"backend": "sdaa"},
    "MULTI_MUSA": {"backend": "musa"},
    "XLA": {"backend": "tpu"},
    "TPU": {"backend": "tpu"},
    "FSDP": {"strategy": "fsdp"},
    "DEEPSPEED": {"strategy": "deepspeed"},
    "MEGATRON_LM": {"strategy": "megatron"},
    "TP": {"strategy": "fsdp"},
    "DATA_PARALLEL": {"strategy": "ddp"},
    "MODEL_PARALLEL": {"strategy": "fsdp"},
}
"""Values of the key `distributed_type`: the slots they fill."""

TENSOR_PARALLEL = ("TP", "MODEL_PARALLEL")
"""Values of `distributed_type` that need the number of processes that share each layer."""

ONE_PROCESS = "NO"
"""The `distributed_type` that means one process, unless the file says how many."""

COMPUTE_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "LOCAL_MACHINE": {},
    "CUSTOM_CLUSTER": {},
    "AMAZON_SAGEMAKER": {"launcher": "sagemaker"},
}
"""Values of the key `compute_environment`: the slots they fill."""

INERT_KEYS: Mapping[str, Inert] = {
    "downcast_bf16": Inert(("no", "false"), ""),
    "main_training_function": Inert(("main",), "the script is run as a whole"),
    "tpu_use_cluster": Inert(
        ("false", "no"), "start the script on each machine of the pod with --machine-rank"
    ),
    "tpu_use_sudo": Inert(
        ("false", "no"), "start the script on each machine of the pod as the user it needs"
    ),
    "tpu_env": Inert(("", "[]"), "set variables in the shell that starts the script"),
    "tpu_name": Inert(("",), "start the script on each machine of the pod with --machine-rank"),
    "tpu_zone": Inert(("",), "start the script on each machine of the pod with --machine-rank"),
    "command_file": Inert(("",), "start the script on each machine of the pod with --machine-rank"),
    "commands": Inert(("", "[]"), "start the script on each machine of the pod with --machine-rank"),
}
"""Keys that ask for nothing with these values; an empty value always asks for nothing."""

LAUNCHER_SECTIONS: Mapping[str, str] = {"mpirun_config": "mpirun"}
"""Sections whose keys are settings of the launch and which, when not empty, choose this launcher."""

YAML_VARIABLES: Mapping[str, str] = {"mpirun_ccl": "CCL_WORKER_COUNT"}
"""Keys that only set a variable in each worker."""

# --- environment ---

ENVIRONMENT: Mapping[str, str] = {
    "ACCELERATE_MIXED_PRECISION": envvars.PRECISION,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": envvars.ACCUMULATION_STEPS,
    "ACCELERATE_DEBUG_MODE": envvars.DEBUG,
    "ACCELERATE_CPU_AFFINITY": envvars.BIND_CPU,
    "ACCELERATE_LOG_LEVEL": envvars.LOG_LEVEL,
    "ACCELERATE_DYNAMO_BACKEND": envvars.DYNAMO_BACKEND,
    "ACCELERATE_DYNAMO_MODE": envvars.DYNAMO_MODE,
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": envvars.DYNAMO_FULLGRAPH,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": envvars.DYNAMO_DYNAMIC,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": envvars.DYNAMO_REGIONS,
}
"""Variables that are another name of a variable."""

ENVIRONMENT_SWITCHES: Mapping[str, tuple[str, str]] = {
    "ACCELERATE_USE_CPU": (envvars.BACKEND, "cpu"),
    "ACCELERATE_USE_FSDP": (envvars.STRATEGY, "fsdp"),
    "ACCELERATE_USE_DEEPSPEED": (envvars.STRATEGY, "deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": (envvars.STRATEGY, "megatron"),
}
"""Variables that, when they mean yes, set another."""

# --- keyword arguments of `Accelerator`, and labels ---

DISTRIBUTED_TYPES = (
    "NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU",
    "MULTI_HPU", "DEEPSPEED", "FSDP", "TP", "XLA", "MEGATRON_LM",
)  # fmt: skip
"""The documented members of `DistributedType`, which exist whether or not their plugin is installed."""

DYNAMO_BACKENDS = (
    "NO", "EAGER", "AOT_EAGER", "INDUCTOR", "AOT_TS_NVFUSER", "NVPRIMS_NVFUSER", "CUDAGRAPHS", "OFI", "FX2TRT",
    "ONNXRT", "TENSORRT", "AOT_TORCHXLA_TRACE_ONCE", "TORCHXLA_TRACE_ONCE", "TVM", "IPEX", "HPU_BACKEND",
)  # fmt: skip
"""The documented members of `DynamoBackend`; some name compilers that PyTorch has dropped since."""

PRECISIONS = {"NO": "no", "FP8": "fp8", "FP16": "fp16", "BF16": "bf16"}
"""The documented members of `PrecisionType`."""

LOGGERS = {
    "ALL": "all", "AIM": "aim", "CLEARML": "clearml", "COMETML": "comet_ml", "DVCLIVE": "dvclive",
    "JSONL": "jsonl", "MLFLOW": "mlflow", "SWANLAB": "swanlab", "TENSORBOARD": "tensorboard",
    "TRACKIO": "trackio", "WANDB": "wandb",
}  # fmt: skip
"""The documented members of `LoggerType`, and the core's own tracker."""

RNG_TYPES = {
    "TORCH": "torch", "GENERATOR": "generator", "CUDA": "cuda", "MLU": "mlu", "SDAA": "sdaa", "MUSA": "musa",
    "NPU": "npu", "XLA": "xla", "XPU": "xpu", "HPU": "hpu", "PYTHON": "python", "NUMPY": "numpy",
    "DEVICE": "device",
}  # fmt: skip
"""The documented members of `RNGType`, and those that work on any device."""

KEYWORD_SLOTS = {
    "mixed_precision": "precision",
    "deepspeed_plugin": "strategy",
    "deepspeed_plugins": "strategy",
    "fsdp_plugin": "strategy",
    "megatron_lm_plugin": "strategy",
    "torch_tp_plugin": "strategy",
    "log_with": "trackers",
}
"""Documented keyword arguments of `Accelerator` that fill a slot with their value."""

KEYWORDS_MOVED = {
    "split_batches": "dataloader_config=DataLoaderConfiguration(split_batches=...)",
    "even_batches": "dataloader_config=DataLoaderConfiguration(even_batches=...)",
    "dispatch_batches": "dataloader_config=DataLoaderConfiguration(dispatch_batches=...)",
    "use_seedable_sampler": "dataloader_config=DataLoaderConfiguration(use_seedable_sampler=...)",
}
"""Documented keyword arguments of `Accelerator` that are given in another way: how."""

KEYWORD_FLAGS = {"cpu": ("backend", "cpu")}
"""Documented keyword arguments that, when true, fill a slot with a fixed value."""

# --- `torchport.utils.is_..._available` ---


class Availability(NamedTuple):
    """What a documented check asks for.

    Attributes:
        device: Name of a backend, or type of a device of PyTorch; empty if it asks for a package.
        package: Import name of a package.
        parameters: Documented parameters of the check, with their defaults.
    """

    device: str = ""
    package: str = ""
    parameters: tuple[tuple[str, Any], ...] = ()


AVAILABILITY: Mapping[str, Availability] = {
    "is_ipex_available": Availability(package="intel_extension_for_pytorch"),
    "is_lomo_available": Availability(package="lomo_optim"),
    "is_mps_available": Availability(device="mps", parameters=(("min_version", "1.12"),)),
    "is_npu_available": Availability(device="npu", parameters=(("check_device", False),)),
    "is_schedulefree_available": Availability(package="schedulefree"),
    "is_torch_xla_available": Availability(
        package="torch_xla", parameters=(("check_is_tpu", False), ("check_is_gpu", False))
    ),
    "is_xpu_available": Availability(device="xpu", parameters=(("check_device", False),)),
}
"""Documented checks, by name."""

PURGED = ("ACCELERATE_", "TORCHPORT_")
"""Beginnings of the variables that `purge_accelerate_environment` takes back."""
STATE_ATTRIBUTES = {
    "deepspeed_plugin": "deepspeed",
    "fsdp_plugin": "fsdp",
    "megatron_lm_plugin": "megatron",
}
"""Documented attributes of `AcceleratorState` with the settings of a strategy: which; `None` under another one."""

STATE_SELECTORS = ("select_deepspeed_plugin",)
"""Documented methods of `AcceleratorState` that select one of several settings of the strategy by name."""

PLUGIN_NAMES: Mapping[str, str] = {
    "DeepSpeedEngineWrapper": "deepspeed",
    "DeepSpeedOptimizerWrapper": "deepspeed",
    "DeepSpeedPlugin": "deepspeed",
    "DeepSpeedSchedulerWrapper": "deepspeed",
    "DummyOptim": "deepspeed",
    "DummyScheduler": "deepspeed",
    "FullyShardedDataParallelPlugin": "fsdp",
    "disable_fsdp_ram_efficient_loading": "fsdp",
    "enable_fsdp_ram_efficient_loading": "fsdp",
    "fsdp2_load_full_state_dict": "fsdp",
    "fsdp2_prepare_auto_wrap_policy": "fsdp",
    "fsdp2_prepare_model": "fsdp",
    "fsdp2_switch_optimizer_parameters": "fsdp",
    "get_module_children_bottom_up": "fsdp",
    "merge_fsdp_weights": "fsdp",
    "get_active_deepspeed_plugin": "deepspeed",
    "AORecipeKwargs": "fp8",
    "FP8RecipeKwargs": "fp8",
    "MSAMPRecipeKwargs": "fp8",
    "TERecipeKwargs": "fp8",
    "apply_fp8_autowrap": "fp8",
    "contextual_fp8_autocast": "fp8",
    "convert_model": "fp8",
    "convert_model_to_fp8_ao": "fp8",
    "filter_linear_layers": "fp8",
    "has_ao_layers": "fp8",
    "has_transformer_engine_layers": "fp8",
    "install_xla": "tpu",
    "AbstractTrainStep": "megatron",
    "BertTrainStep": "megatron",
    "GPTTrainStep": "megatron",
    "MegatronLMDummyDataLoader": "megatron",
    "MegatronLMDummyScheduler": "megatron",
    "MegatronLMPlugin": "megatron",
    "T5TrainStep": "megatron",
    "avg_losses_across_data_parallel_group": "megatron",
}
"""Documented names of `torchport.utils` that a plugin brings: which."""

STANDARD_LAUNCHER = "standard"
MACHINE_LAUNCHERS: Mapping[str, str] = {
    "deepspeed_hostfile": "deepspeed",
    "deepspeed_inclusion_filter": "deepspeed",
    "deepspeed_exclusion_filter": "deepspeed",
    "deepspeed_multinode_launcher": "deepspeed",
}
"""Settings of plugins that, when given, choose a launcher; the value `standard` leaves the choice."""

RENAMED: Mapping[str, str] = {
    "DeepSpeedSequenceParallelConfig": "torchport.plugin.parallelism:SequenceParallelConfig",
}
"""Documented names of classes that are called otherwise here: module and name."""

MESH_PLUGIN = "fsdp"
"""The plugin whose strategy lays models out over a mesh of several dimensions."""

# --- which plugin reads what ---

PLUGIN_PREFIXES: Mapping[str, str] = {
    "fsdp": "fsdp",
    "deepspeed": "deepspeed",
    "zero": "deepspeed",
    "zero3": "deepspeed",
    "offload": "deepspeed",
    "gradient_clipping": "deepspeed",
    "megatron_lm": "megatron",
    "fp8": "fp8",
    "tpu": "tpu",
    "vm": "tpu",
    "downcast": "tpu",
    "aws": "sagemaker",
    "ec2": "sagemaker",
    "sagemaker": "sagemaker",
    "mpirun": "cpu",
}
"""Beginnings of documented flags, keys and sections, and the plugin that brings them."""


def plugin_of(spelling: str) -> str:
    """Return the plugin that brings a documented flag, key or section; empty if none is known to."""
    plain = spelling.lstrip("-").replace("-", "_")
    found = [prefix for prefix in PLUGIN_PREFIXES if plain == prefix or plain.startswith(prefix + "_")]
    return PLUGIN_PREFIXES[max(found, key=len)] if found else ""


# --- trackers ---

TRACKER_CLASSES: Mapping[str, str] = {
    "AimTracker": "aim",
    "ClearMLTracker": "clearml",
    "CometMLTracker": "comet_ml",
    "DVCLiveTracker": "dvclive",
    "MLflowTracker": "mlflow",
    "SwanLabTracker": "swanlab",
    "TensorBoardTracker": "tensorboard",
    "TrackioTracker": "trackio",
    "WandBTracker": "wandb",
}
"""Documented classes of trackers: the name of the tracker whose factory each is."""


def distribution_of(kind: str, name: str) -> str:
    """Return what to install for a plugin of this kind and name, as one types it after `pip install`."""
    if kind == "tracker" and name in TRACKER_CLASSES.values():
        return f"'torchport-trackers[{name}]'"
    return f"torchport-{name.replace('_', '-')}"


def translate_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with documented variables translated: `TORCHPORT_...` set where only the other was.

    The name under which a user set each is kept in `TORCHPORT_ORIGINS`, for messages.

    Raises:
        ConfigurationError: if two variables ask for different things.
    """
    wanted: dict[str, tuple[str, str]] = {}
    for spelling, variable in ENVIRONMENT.items():
        if environ.get(spelling):
            wanted[variable] = (environ[spelling], spelling)
    for spelling, (variable, value) in ENVIRONMENT_SWITCHES.items():
        if not envvars.flag(environ, spelling):
            continue
        other = wanted.get(variable)
        if other is not None and other[0] != value:
            raise ConfigurationError(
                f"{spelling} asks for {variable}={value}, and {other[1]} for {variable}={other[0]}",
                hint=f"unset one of them, or set {variable}",
            )
        wanted[variable] = (value, spelling)
    missing = {variable: pair for variable, pair in wanted.items() if not environ.get(variable)}
    if not missing:
        return dict(environ)
    origins = envvars.origins(environ) | {variable: spelling for variable, (_, spelling) in missing.items()}
    values = {variable: value for variable, (value, _) in missing.items()}
    return {**environ, **values, envvars.ORIGINS: envvars.format_origins(origins)}


def resolve_keywords(
    keywords: Mapping[str, Any], slots: Mapping[str, Any], known: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fill slots from older keyword arguments.

    Args:
        keywords: Arguments that are not slots themselves.
        slots: Values already given by slot; `None` means not given.
        known: Further names for the did-you-mean of an unknown argument.

    Raises:
        TypeError: for an unknown argument, or two that fill one slot differently.
    """
    filled = {slot: value for slot, value in slots.items() if value is not None}
    spelled = {slot: slot for slot in filled}
    for keyword, value in keywords.items():
        if keyword in KEYWORD_FLAGS:
            slot, implied = KEYWORD_FLAGS[keyword]
            value = implied if value else None
        elif keyword in KEYWORD_SLOTS:
            slot = KEYWORD_SLOTS[keyword]
        elif keyword in KEYWORDS_MOVED:
            raise TypeError(f"Accelerator takes no argument {keyword!r}; write {KEYWORDS_MOVED[keyword]}")
        else:
            candidates = [*KEYWORD_SLOTS, *KEYWORD_FLAGS, *slots, *known]
            import difflib

            near = difflib.get_close_matches(keyword, candidates, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Accelerator takes no argument {keyword!r}{hint}")
        if value is None:
            continue
        if slot in filled and filled[slot] != value:
            raise TypeError(
                f"{keyword}={value!r} and {spelled[slot]}={filled[slot]!r} both fill the slot {slot!r};"
                " give one"
            )
        filled[slot], spelled[slot] = value, keyword
    return filled
