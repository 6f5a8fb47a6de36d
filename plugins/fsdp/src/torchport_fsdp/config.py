"""Settings of the strategy `fsdp`. Imports no torch: the command line reads them for `--help`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torchport.config.kwargs import KwargsHandler
from torchport.plugin import ParallelismConfig, setting


class _Choice(str, enum.Enum):
    """A choice by name, by its documented number, or by PyTorch's member of the same name."""

    @classmethod
    def _missing_(cls, value: object) -> _Choice | None:
        name = getattr(value, "name", value)
        members = list(cls)
        text = str(name).strip()
        if text.isdigit() and 1 <= int(text) <= len(members):
            return members[int(text) - 1]
        return next((member for member in members if member.value == text.upper()), None)


class ShardingStrategy(_Choice):
    """What is spread over the processes, in the order of the documented numbers 1 to 5."""

    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    NO_SHARD = "NO_SHARD"
    HYBRID_SHARD = "HYBRID_SHARD"
    HYBRID_SHARD_ZERO2 = "HYBRID_SHARD_ZERO2"

    @property
    def reshards(self) -> bool:
        """Whether whole parameters are given up between forward and backward."""
        return self in (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)

    @property
    def hybrid(self) -> bool:
        """Whether it shards inside groups of processes and replicates between them."""
        return self in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy.HYBRID_SHARD_ZERO2)


class AutoWrapPolicy(_Choice):
    """Which modules become units of their own, whose parameters are gathered together."""

    TRANSFORMER_BASED_WRAP = "TRANSFORMER_BASED_WRAP"
    SIZE_BASED_WRAP = "SIZE_BASED_WRAP"
    NO_WRAP = "NO_WRAP"


class BackwardPrefetch(_Choice):
    """When the parameters of the next unit of a backward are gathered."""

    BACKWARD_PRE = "BACKWARD_PRE"
    BACKWARD_POST = "BACKWARD_POST"
    NO_PREFETCH = "NO_PREFETCH"


class StateDictType(_Choice):
    """What `save_state` writes."""

    FULL_STATE_DICT = "FULL_STATE_DICT"
    LOCAL_STATE_DICT = "LOCAL_STATE_DICT"
    SHARDED_STATE_DICT = "SHARDED_STATE_DICT"


def _names(kind: type[_Choice]) -> tuple[str, ...]:
    return tuple(str(member.value) for member in kind)


@dataclass
class FullyShardedDataParallelPlugin(KwargsHandler):
    """How models are sharded; `Accelerator(strategy=...)` or `fsdp_plugin=...` takes it.

    Fields left at `None` are settled when the object is made, so that reading them tells what will be done.

    Attributes:
        fsdp_version: 2 for `torch.distributed.fsdp.fully_shard`, 1 for `FullyShardedDataParallel`.
        sharding_strategy: What is spread over the processes. With FSDP2, `reshard_after_forward` may say it instead.
        reshard_after_forward: Whether units give up their whole parameters after a forward (FSDP2); a number keeps
            them sharded over that many processes.
        backward_prefetch: When the next unit's parameters are gathered in a backward. FSDP2 knows `BACKWARD_PRE`
            and `NO_PREFETCH`.
        mixed_precision_policy: `MixedPrecisionPolicy` (FSDP2), `MixedPrecision` (FSDP1), a dictionary with their
            fields, or the name of a dtype; `None` follows the run's precision.
        auto_wrap_policy: A name, or a function that is given a module and returns whether it is a unit; `None` goes
            by `transformer_cls_names_to_wrap`, `min_num_params` or the model's own `_no_split_modules`, if there are
            any, and else makes the model one unit.
        cpu_offload: Whether parameters, gradients and optimizer states stay in host memory.
        ignored_modules: Modules that are not sharded, or a regular expression that matches their names.
        ignored_params: Parameters that are not sharded, or a regular expression that matches their names.
        state_dict_type: What `save_state` writes; `None` means sharded with FSDP2 and full with FSDP1.
        state_dict_config: An object with `offload_to_cpu` and `rank0_only`, for whole model states.
        optim_state_dict_config: The same for optimizer states.
        limit_all_gathers: Whether the processor waits before it queues too many gathers (FSDP1; FSDP2 always does).
        use_orig_params: Whether parameters keep their identity (FSDP1; with FSDP2 they always do).
        param_init_fn: Called with each module that has parameters on the meta device, once these have memory.
        sync_module_states: Whether all processes start from the parameters and buffers of rank 0.
        forward_prefetch: Whether the parameters of the next unit are gathered during a forward.
        activation_checkpointing: Whether units compute their activations anew in a backward.
        cpu_ram_efficient_loading: Whether only rank 0 holds a model before it is sharded.
        transformer_cls_names_to_wrap: Names of the classes of modules that become units.
        min_num_params: Fewest parameters of a unit, for `SIZE_BASED_WRAP`.
        shard_group_size: Over how many processes the hybrid strategies shard; 0 means those of one machine.
    """

    __torchport_prefix__: ClassVar[str] = "fsdp"

    fsdp_version: int = setting(
        2, help="1 for FullyShardedDataParallel, 2 for fully_shard.",
        flag="fsdp_version", yaml="fsdp_version", env="FSDP_VERSION", choices=("1", "2"),
    )  # fmt: skip
    sharding_strategy: ShardingStrategy | None = setting(
        None, help="What is spread over the processes.", choices=_names(ShardingStrategy)
    )
    reshard_after_forward: Any = setting(
        None,
        help="FSDP2: whether units give up whole parameters after a forward, or how many processes share them then.",
    )
    backward_prefetch: BackwardPrefetch | None = setting(
        None, help="When the parameters of the next unit are gathered in a backward.",
        choices=_names(BackwardPrefetch), aliases=("fsdp_backward_prefetch_policy",),
    )  # fmt: skip
    mixed_precision_policy: Any = None
    auto_wrap_policy: AutoWrapPolicy | Callable[..., bool] | None = setting(
        None, help="Which modules become units.", choices=_names(AutoWrapPolicy)
    )
    cpu_offload: bool | Any = setting(
        False, help="Keep parameters, gradients and optimizer states in host memory.",
        flag="fsdp_offload_params", yaml="fsdp_offload_params", env="FSDP_OFFLOAD_PARAMS",
    )  # fmt: skip
    ignored_modules: str | Iterable[Any] | None = setting(
        None, help="Regular expression for names of modules that are not sharded."
    )
    ignored_params: str | Iterable[Any] | None = setting(
        None, help="Regular expression for names of parameters that are not sharded."
    )
    state_dict_type: StateDictType | None = setting(
        None, help="What save_state writes.", choices=_names(StateDictType)
    )
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = setting(True, help="FSDP1: wait before too many gathers are queued.")
    use_orig_params: bool | None = setting(None, help="FSDP1: parameters keep their identity. FSDP2: always.")
    param_init_fn: Callable[..., Any] | None = None
    sync_module_states: bool | None = setting(
        None, help="All processes start from the parameters and buffers of rank 0."
    )
    forward_prefetch: bool = setting(
        False,
        help="Gather the next unit's parameters during a forward; for models that always run the same units.",
    )
    activation_checkpointing: bool = setting(
        False, help="Units compute their activations anew in a backward."
    )
    cpu_ram_efficient_loading: bool = setting(False, help="Only rank 0 holds a model before it is sharded.")
    transformer_cls_names_to_wrap: list[str] | None = setting(
        None, help="Names of the classes of modules that become units, separated by commas.",
        flag="fsdp_transformer_layer_cls_to_wrap", yaml="fsdp_transformer_layer_cls_to_wrap",
        env="FSDP_TRANSFORMER_CLS_TO_WRAP",
    )  # fmt: skip
    min_num_params: int | None = setting(None, help="Fewest parameters of a unit, for SIZE_BASED_WRAP.")
    shard_group_size: int = setting(
        0, help="Over how many processes the hybrid strategies shard; 0 means those of one machine."
    )

    def __post_init__(self) -> None:
        if self.fsdp_version not in (1, 2):
            raise ValueError(f"fsdp_version must be 1 or 2, found {self.fsdp_version!r}")
        self._settle_choices()
        self._settle_sharding()
        self._settle_switches()
        if self.fsdp_version == 2:
            self._check_version_2()

    def parallelism_problem(self, parallelism: ParallelismConfig) -> str:
        """Say why these settings do not go with a mesh; empty if they do."""
        if self.fsdp_version == 1:
            return "FSDP1 knows one dimension; fsdp_version=2 takes a mesh"
        strategy = self.sharding_strategy
        if strategy is not None and (strategy.hybrid or strategy is ShardingStrategy.NO_SHARD):
            return (
                f"sharding_strategy={strategy.value} divides the processes by itself; leave it out:"
                " dp_replicate_size and dp_shard_size say the same"
            )
        if self.shard_group_size:
            return f"shard_group_size={self.shard_group_size} is said by dp_shard_size; leave it out"
        return ""

    def _settle_choices(self) -> None:
        for name, kind in (
            ("sharding_strategy", ShardingStrategy),
            ("backward_prefetch", BackwardPrefetch),
            ("state_dict_type", StateDictType),
        ):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _chosen(name, kind, value))
        if self.auto_wrap_policy is not None and not callable(self.auto_wrap_policy):
            self.auto_wrap_policy = _chosen("auto_wrap_policy", AutoWrapPolicy, self.auto_wrap_policy)
        listed: Any = self.transformer_cls_names_to_wrap
        if isinstance(listed, str):
            names = listed.split(",")
            self.transformer_cls_names_to_wrap = [name.strip() for name in names if name.strip()]
        if self.state_dict_type is None:
            sharded = self.fsdp_version == 2
            self.state_dict_type = (
                StateDictType.SHARDED_STATE_DICT if sharded else StateDictType.FULL_STATE_DICT
            )
        if self.state_dict_type is StateDictType.LOCAL_STATE_DICT:
            raise ValueError(
                "LOCAL_STATE_DICT loads only into as many processes as saved it; use SHARDED_STATE_DICT"
            )
        if self.min_num_params is not None and self.min_num_params < 0:
            raise ValueError(f"min_num_params must be at least 0, found {self.min_num_params}")

    def _settle_sharding(self) -> None:
        asked = self.reshard_after_forward
        if isinstance(asked, str):  # FSDP1's strategy under FSDP2's name
            lowered = asked.strip().lower()
            if lowered in ("true", "false"):
                asked = self.reshard_after_forward = lowered == "true"
            elif lowered.isdigit():
                asked = self.reshard_after_forward = int(lowered)
            else:
                asked = self.reshard_after_forward = None
                self.sharding_strategy = _chosen("reshard_after_forward", ShardingStrategy, lowered.upper())
        if self.sharding_strategy is None:
            whole = asked is False
            self.sharding_strategy = ShardingStrategy.SHARD_GRAD_OP if whole else ShardingStrategy.FULL_SHARD
        elif asked is not None and bool(asked) != self.sharding_strategy.reshards:
            raise ValueError(
                f"reshard_after_forward={asked} and sharding_strategy={self.sharding_strategy.value} disagree;"
                " leave out one of them"
            )
        if asked is None:
            self.reshard_after_forward = self.sharding_strategy.reshards
        elif self.fsdp_version == 1 and not isinstance(asked, bool):
            raise ValueError("reshard_after_forward is true or false with fsdp_version=1")
        if self.shard_group_size < 0:
            raise ValueError(f"shard_group_size must be at least 0, found {self.shard_group_size}")

    def _settle_switches(self) -> None:
        self.cpu_offload = _offloads(self.cpu_offload)
        if self.backward_prefetch is None:
            self.backward_prefetch = BackwardPrefetch.BACKWARD_PRE
        if self.use_orig_params is None:
            self.use_orig_params = True
        if self.sync_module_states is None:
            self.sync_module_states = True
        if self.cpu_ram_efficient_loading and not self.sync_module_states:
            raise ValueError(
                "cpu_ram_efficient_loading needs sync_module_states: only rank 0 has weights to start from"
            )

    def _check_version_2(self) -> None:
        """Refuse what FSDP2 does not do: nothing that is asked for is ignored."""
        for name, refused, instead in (
            ("use_orig_params", False, "with FSDP2 parameters always keep their identity"),
            ("limit_all_gathers", False, "FSDP2 always limits them"),
            ("backward_prefetch", BackwardPrefetch.BACKWARD_POST, "FSDP2 knows BACKWARD_PRE and NO_PREFETCH"),
        ):
            if getattr(self, name) == refused:
                shown = getattr(refused, "value", refused)
                raise ValueError(f"{name}={shown} needs fsdp_version=1: {instead}")


def _chosen(name: str, kind: type[_Choice], value: Any) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{name} must be one of {', '.join(_names(kind))}, found {value!r}") from error


def _offloads(value: Any) -> bool:
    """Read a switch, its text, PyTorch's `CPUOffload`, or an offload policy of FSDP2."""
    if isinstance(value, str):
        lowered = value.strip().lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"cpu_offload must be true or false, found {value!r}")
        return lowered in ("true", "1", "yes")
    offload = getattr(value, "offload_params", None)
    if offload is not None:
        return bool(offload)
    return value if isinstance(value, bool) else type(value).__name__ == "CPUOffloadPolicy"
