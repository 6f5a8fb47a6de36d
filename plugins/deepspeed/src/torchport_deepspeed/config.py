"""Settings of the strategy and the launcher `deepspeed`. Imports no torch: the command line reads them for `--help`.

Every setting of the strategy stands for a place in DeepSpeed's own configuration (`PLACES`). What is given as an
argument, flag, key or variable fills an `"auto"` or an empty place of the configuration file; where the file says
something else, that is an error that lists all such settings at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torchport.config.schema import from_environment, setting, settings_of
from torchport.errors import ConfigurationError

from torchport_deepspeed import ds_config

AUTO = ds_config.AUTO

PLACES: Mapping[str, str] = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
"""Settings, and their places in DeepSpeed's configuration."""

_DEFAULTS: Mapping[str, Any] = {
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "zero_stage": 2,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_save_16bit_model": False,
}
_DEVICES = ("none", "cpu", "nvme")
_LAUNCHERS = ("pdsh", "standard", "openmpi", "mvapich", "mpich", "impi", "slurm", "nossh")


@dataclass
class DeepSpeedPlugin:
    """How models are handed to DeepSpeed.

    Attributes left out take the documented variable of the same meaning, and then the default.

    Attributes:
        hf_ds_config: DeepSpeed's own configuration: the path of a JSON file, a dict, or the JSON in base64.
            `"auto"` values in it are worked out by `prepare`.
        gradient_accumulation_steps: Micro-batches for each optimizer step; `"auto"` takes the accelerator's.
        gradient_clipping: Total norm to clip gradients to; `"auto"` clips where the script asks for it.
        zero_stage: 0 to 3: nothing, optimizer states, also gradients, also parameters are partitioned.
        is_train_batch_min: Whether the smallest batch size of several loaders counts, or the largest.
        offload_optimizer_device: Where optimizer states are kept: `"none"`, `"cpu"` or `"nvme"`.
        offload_param_device: Where parameters are kept (stage 3): `"none"`, `"cpu"` or `"nvme"`.
        offload_optimizer_nvme_path: Folder for optimizer states on disk.
        offload_param_nvme_path: Folder for parameters on disk.
        zero3_init_flag: Whether models are constructed partitioned (`deepspeed.zero.Init`); stage 3.
        zero3_save_16bit_model: Whether the engine's own `save_16bit_model` gathers the weights; stage 3.
        transformer_moe_cls_names: Classes of mixture-of-experts layers, separated by commas; stage 3 gathers
            each as a whole.
        enable_msamp: Not supported: MS-AMP is no longer maintained.
        msamp_opt_level: As `enable_msamp`.
        hostfile: The machines, for the launcher `deepspeed`.
        exclusion_filter: Machines and devices to leave out, in DeepSpeed's notation.
        inclusion_filter: Machines and devices to use, in DeepSpeed's notation.
        multinode_launcher: How the launcher `deepspeed` reaches other machines.

    Raises:
        ConfigurationError: if a value is not allowed, if the configuration cannot be read, or if it and the
            other settings disagree.
    """

    __torchport_prefix__: ClassVar[str] = "deepspeed"

    hf_ds_config: Any = setting(
        None,
        help="DeepSpeed's own configuration: a JSON file, or JSON in base64.",
        flag="deepspeed_config_file",
        yaml="deepspeed_config_file",
        env="ACCELERATE_DEEPSPEED_CONFIG_FILE",
    )
    gradient_accumulation_steps: int | str | None = setting(
        None,
        help="Micro-batches for each optimizer step, or auto.",
        flag="gradient_accumulation_steps",
        yaml="gradient_accumulation_steps",
        env="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    )
    gradient_clipping: float | str | None = setting(
        None,
        help="Total norm to clip gradients to, or auto.",
        flag="gradient_clipping",
        yaml="gradient_clipping",
        env="ACCELERATE_GRADIENT_CLIPPING",
    )
    zero_stage: int | None = setting(
        None,
        help="ZeRO stage: 0 none, 1 optimizer states, 2 and gradients, 3 and parameters [default: 2].",
        choices="0123",
        flag="zero_stage",
        yaml="zero_stage",
        env="ACCELERATE_DEEPSPEED_ZERO_STAGE",
    )
    is_train_batch_min: bool = setting(
        True, help="Whether the smallest batch size of several loaders counts.", flag="", yaml="", env=""
    )
    offload_optimizer_device: str | None = setting(
        None,
        help="Where optimizer states are kept.",
        choices=_DEVICES,
        flag="offload_optimizer_device",
        yaml="offload_optimizer_device",
        env="ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    )
    offload_param_device: str | None = setting(
        None,
        help="Where parameters are kept (stage 3).",
        choices=_DEVICES,
        flag="offload_param_device",
        yaml="offload_param_device",
        env="ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    )
    offload_optimizer_nvme_path: str | None = setting(
        None,
        help="Folder for optimizer states on disk.",
        flag="offload_optimizer_nvme_path",
        yaml="offload_optimizer_nvme_path",
        env="ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    )
    offload_param_nvme_path: str | None = setting(
        None,
        help="Folder for parameters on disk.",
        flag="offload_param_nvme_path",
        yaml="offload_param_nvme_path",
        env="ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    )
    zero3_init_flag: bool | None = setting(
        None,
        help="Construct models partitioned (stage 3).",
        flag="zero3_init_flag",
        yaml="zero3_init_flag",
        env="ACCELERATE_DEEPSPEED_ZERO3_INIT",
    )
    zero3_save_16bit_model: bool | None = setting(
        None,
        help="Let the engine's save_16bit_model gather the weights (stage 3).",
        flag="zero3_save_16bit_model",
        yaml="zero3_save_16bit_model",
        env="ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    )
    transformer_moe_cls_names: str | None = setting(
        None,
        help="Classes of mixture-of-experts layers, separated by commas (stage 3).",
        flag="deepspeed_moe_layer_cls_names",
        yaml="deepspeed_moe_layer_cls_names",
        env="ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
    )
    enable_msamp: bool | None = setting(None, help="Not supported.", flag="", yaml="", env="")
    msamp_opt_level: str | None = setting(None, help="Not supported.", flag="", yaml="", env="")
    hostfile: str | None = setting(
        None,
        help="The machines, for the launcher deepspeed.",
        env="ACCELERATE_DEEPSPEED_HOSTFILE",
    )
    exclusion_filter: str | None = setting(
        None, help="Machines and devices to leave out.", env="ACCELERATE_DEEPSPEED_EXCLUSION_FILTER"
    )
    inclusion_filter: str | None = setting(
        None, help="Machines and devices to use.", env="ACCELERATE_DEEPSPEED_INCLUSION_FILTER"
    )
    multinode_launcher: str | None = setting(
        None,
        help="How the launcher deepspeed reaches other machines [default: pdsh].",
        choices=_LAUNCHERS,
        env="ACCELERATE_DEEPSPEED_MULTINODE_LAUNCHER",
    )

    def __post_init__(self) -> None:
        for name, value in from_environment(type(self), os.environ).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check()
        given = {name: getattr(self, name) for name in PLACES if getattr(self, name) is not None}
        self.deepspeed_config: dict[str, Any] = ds_config.read(self.hf_ds_config)
        self.has_file = self.hf_ds_config is not None
        problems = [*self._fill(given), *ds_config.problems(self.deepspeed_config)]
        if problems:
            raise ConfigurationError(
                "DeepSpeed's configuration and the other settings do not fit together",
                found="".join(f"\n    {problem}" for problem in problems),
                hint='leave these settings out, or write "auto" in the configuration file',
            )
        self.selected = True
        self.steps_given = isinstance(
            ds_config.get(self.deepspeed_config, "gradient_accumulation_steps"), int
        )
        self.dschf: Any = None
        self.zero3_init_flag = bool(self.zero3_init_flag) and self.zero_stage == 3

    def _check(self) -> None:
        """Check each value by itself, as it comes from a script unconverted."""
        kind: Any = type(self)
        for item in settings_of(kind):
            if item.name != "hf_ds_config":
                value = item.coerce(getattr(self, item.name), f"DeepSpeedPlugin({item.name}=...)")
                setattr(self, item.name, value)
        for name in ("gradient_accumulation_steps", "gradient_clipping"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise ConfigurationError(f"DeepSpeedPlugin({name}={value!r}): a number, or {AUTO!r}")
        if isinstance(self.gradient_accumulation_steps, int) and self.gradient_accumulation_steps < 1:
            raise ConfigurationError(
                f"gradient_accumulation_steps must be at least 1, found {self.gradient_accumulation_steps}"
            )
        if self.enable_msamp or self.msamp_opt_level:
            raise ConfigurationError(
                "DeepSpeedPlugin(enable_msamp=True) is not supported",
                reason="MS-AMP is no longer maintained, and does not work with this DeepSpeed",
                hint="precision bf16",
            )

    def _fill(self, given: Mapping[str, Any]) -> list[str]:
        """Put the settings where the configuration leaves a place for them, and name those that disagree."""
        problems = []
        for name, place in PLACES.items():
            there = ds_config.get(self.deepspeed_config, place)
            wanted = given.get(name, _DEFAULTS.get(name))
            if there is None and (name in given or not self.has_file or name == "zero_stage"):
                is_path = name.endswith("_path")
                if wanted is not None and not (wanted == "none" or (is_path and name not in given)):
                    ds_config.put(self.deepspeed_config, place, wanted)
            elif there == AUTO and wanted is not None:
                ds_config.put(self.deepspeed_config, place, wanted)
            elif name in given and there is not None and not ds_config.same(there, given[name]):
                problems.append(f"{name}: {given[name]!r} is asked for, and the file has {place}: {there!r}")
        self.zero_stage = int(ds_config.get(self.deepspeed_config, PLACES["zero_stage"]) or 0)
        return problems

    # --- what the file says --------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """The precision that the configuration asks for; empty where it leaves the choice."""
        for name in ("bf16", "fp16"):
            if ds_config.get(self.deepspeed_config, f"{name}.enabled") is True:
                return name
        return ""

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration, such as `deepspeed.zero.Init(config_dict_or_path=...)` takes it."""
        return ds_config.for_init(self.deepspeed_config)

    def get_value(self, place: str, default: Any = None) -> Any:
        """Return what the configuration has at a place such as `"zero_optimization.stage"`."""
        value = ds_config.get(self.deepspeed_config, place)
        return default if value is None else value

    def is_auto(self, place: str) -> bool:
        """Whether the configuration has `"auto"` at a place."""
        return bool(self.get_value(place) == AUTO)

    # --- one of several ------------------------------------------------------------------------------------

    def select(self) -> None:
        """Make this the plugin that the next `prepare` uses; `AcceleratorState.select_deepspeed_plugin` does so."""
        self.selected = True

    # --- models constructed partitioned --------------------------------------------------------------------

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are constructed partitioned now."""
        return bool(self.zero3_init_flag)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Return a context in which models are constructed partitioned, or are not.

        Args:
            enable: Whether they are. Has an effect with ZeRO stage 3 only.
        """
        before = self.zero3_init_flag
        self.zero3_init_flag = enable and self.zero_stage == 3
        self.announce()
        try:
            yield
        finally:
            self.zero3_init_flag = before
            self.announce()

    def announce(self) -> None:
        """Tell Transformers, where it is in use, whether its models are to be constructed partitioned."""
        import sys

        if "transformers" not in sys.modules:
            return
        from transformers.integrations.deepspeed import (  # type: ignore[import-not-found,unused-ignore]
            HfDeepSpeedConfig,
            unset_hf_deepspeed_config,
        )

        if self.zero3_init_flag:
            self.dschf = HfDeepSpeedConfig(
                copy.deepcopy(self.config)
            )  # kept: it is registered while it lives
        elif self.dschf is not None:
            unset_hf_deepspeed_config()
            self.dschf = None


def get_active_deepspeed_plugin(state: Any) -> DeepSpeedPlugin:
    """Return the plugin that the next `prepare` uses.

    Args:
        state: An `AcceleratorState`, or an accelerator.

    Raises:
        ConfigurationError: if the run's strategy is another.
    """
    settings = getattr(state, "deepspeed_plugin", None)
    if not isinstance(settings, DeepSpeedPlugin):
        raise ConfigurationError(
            "there is no active DeepSpeedPlugin",
            found=f"the strategy of this run is {state.plan.strategy!r}",
            hint="Accelerator(deepspeed_plugin=DeepSpeedPlugin(...))",
        )
    return settings
