"""How the processes of a job are divided over a mesh of named dimensions. Imports no torch.

The names are those that Accelerate documents. A process's place in the mesh follows from its rank: `tp` varies
fastest, then `sp`, `cp`, `dp_shard`, and `dp_replicate` slowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchport.config.schema import setting
from torchport.errors import ConfigurationError
from torchport.plugin.specs import Topology

DIMENSIONS = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
"""The dimensions of a mesh, the slowest to vary with the rank first."""

TITLES = {
    "dp_replicate": "replicas of the model",
    "dp_shard": "sharded data parallelism",
    "cp": "context parallelism",
    "sp": "sequence parallelism",
    "tp": "tensor parallelism",
}
"""What each dimension is called in messages."""

_BACKENDS = (None, "", "torch")


@dataclass
class TorchTensorParallelConfig:
    """How layers are spread over the processes of tensor parallelism.

    Attributes:
        enable_async_tp: Only `False` is accepted: overlapped exchanges need memory that devices share.
        plan: By name of a module, where `*` stands for one part of a name: the name of a style (`"colwise"`,
            `"rowwise"`, …) or a `torch.distributed.tensor.parallel.ParallelStyle`. `None` takes the model's own
            plan (`tp_plan` or `_tp_plan`).
    """

    enable_async_tp: bool = False
    plan: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.enable_async_tp:
            raise ConfigurationError(
                "enable_async_tp=True is not supported",
                reason="exchanges that overlap with products need memory that devices share, and a compiler for it",
                hint="leave it out",
            )


@dataclass
class TorchContextParallelConfig:
    """How the processes of context parallelism exchange keys and values.

    Attributes:
        cp_comm_strategy: `"allgather"`: every process gathers all keys and values; `"alltoall"`: they are handed
            on from process to process, in a ring, so that each holds one part at a time.
    """

    cp_comm_strategy: str = "allgather"

    def __post_init__(self) -> None:
        if self.cp_comm_strategy not in ("allgather", "alltoall"):
            raise ConfigurationError(
                f"cp_comm_strategy={self.cp_comm_strategy!r} is not known", hint="'allgather' or 'alltoall'"
            )


@dataclass
class SequenceParallelConfig:
    """What the processes of sequence parallelism may rely on.

    Attributes:
        sp_seq_length: Length of the sequences before they are divided; `None` for any.
        sp_seq_length_is_variable: Whether sequences of other lengths are accepted.
        sp_attn_implementation: Which attention of the model exchanges heads: `"sdpa"`, PyTorch's
            `scaled_dot_product_attention`.
    """

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool = True
    sp_attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if self.sp_attn_implementation != "sdpa":
            raise ConfigurationError(
                f"sp_attn_implementation={self.sp_attn_implementation!r} is not supported",
                reason="heads are exchanged around torch.nn.functional.scaled_dot_product_attention",
                hint="sp_attn_implementation='sdpa', and a model that uses it",
            )
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            raise ConfigurationError(
                "sp_seq_length_is_variable=False needs a length", hint="sp_seq_length=... or leave both out"
            )


@dataclass
class ParallelismConfig:
    """Over how many processes each dimension of the mesh extends; `Accelerator(parallelism_config=...)` takes it.

    The product of the sizes is the number of processes. A dimension of size 1 is not used.

    Attributes:
        dp_replicate_size: Groups of processes that each hold the whole model, and different batches.
        dp_shard_size: Processes over which parameters, gradients and optimizer states are sharded, with different
            batches.
        tp_size: Processes over which layers are spread (tensor parallelism), with the same batches.
        cp_size: Processes over which sequences are spread in attention that exchanges keys and values (context
            parallelism), with the same batches.
        sp_size: Processes over which sequences are spread in attention that exchanges heads (sequence parallelism,
            Ulysses), with the same batches.
        cp_backend: Only `"torch"`.
        sp_backend: Only `"torch"`.
        tp_handler: Further settings of tensor parallelism.
        cp_handler: Further settings of context parallelism.
        sp_handler: Further settings of sequence parallelism.
        cp_comm_strategy: The same as in `cp_handler`.
        tp_plan: The same as `plan` in `tp_handler`.
        sp_seq_length: The same as in `sp_handler`.
        sp_seq_length_is_variable: The same as in `sp_handler`.
        sp_attn_implementation: The same as in `sp_handler`.

    Raises:
        ConfigurationError: if a size is not at least 1, or a setting is not supported.
    """

    __torchport_prefix__: ClassVar[str] = "parallelism_config"
    __torchport_section__: ClassVar[str] = "parallelism_config"

    dp_replicate_size: int = setting(1, help="Groups of processes that each hold the whole model.")
    dp_shard_size: int = setting(1, help="Processes over which parameters and optimizer states are sharded.")
    tp_size: int = setting(1, help="Processes over which layers are spread (tensor parallelism).")
    cp_size: int = setting(
        1,
        help="Processes over which sequences are spread; keys and values are exchanged (context parallelism).",
    )
    sp_size: int = setting(
        1, help="Processes over which sequences are spread; heads are exchanged (sequence parallelism)."
    )
    cp_backend: str | None = setting(None, help="Only torch.")
    sp_backend: str | None = setting(None, help="Only torch.")
    tp_handler: TorchTensorParallelConfig | None = None
    cp_handler: TorchContextParallelConfig | None = None
    sp_handler: SequenceParallelConfig | None = None
    cp_comm_strategy: str | None = setting(
        None,
        help="How keys and values are exchanged: all at once, or in a ring.",
        choices=("allgather", "alltoall"),
    )
    tp_plan: dict[str, Any] | None = setting(
        None, help="Style of each module by name (JSON); by default the model's own plan."
    )
    sp_seq_length: int | None = setting(None, help="Length of the sequences before they are divided.")
    sp_seq_length_is_variable: bool | None = setting(
        None, help="Accept sequences of other lengths too (the default)."
    )
    sp_attn_implementation: str | None = setting(None, help="Only sdpa.")

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigurationError(
                    f"{name}_size must be a whole number, at least 1",
                    found=repr(size),
                    hint=f"leave {name}_size out for none",
                )
        for name in ("cp_backend", "sp_backend"):
            if getattr(self, name) not in _BACKENDS:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is not supported",
                    reason="sequences are spread by Torchport's own exchanges, over any collectives",
                    hint=f"leave {name} out, or {name}='torch'",
                )
        self._settle_handlers()
        if self.cp_enabled and self.sp_enabled:
            raise ConfigurationError(
                f"cp_size={self.cp_size} and sp_size={self.sp_size} both spread sequences",
                hint="one of the two; cp_size for few heads, sp_size where the heads can be divided",
            )

    def _settle_handlers(self) -> None:
        """Let handlers and the fields that stand for theirs say the same."""
        self.tp_handler = self._handler("tp_handler", TorchTensorParallelConfig, {"plan": self.tp_plan})
        self.cp_handler = self._handler(
            "cp_handler", TorchContextParallelConfig, {"cp_comm_strategy": self.cp_comm_strategy}
        )
        names = ("sp_seq_length", "sp_seq_length_is_variable", "sp_attn_implementation")
        self.sp_handler = self._handler(
            "sp_handler", SequenceParallelConfig, {name: getattr(self, name) for name in names}
        )
        self.tp_plan = None if self.tp_handler.plan is None else dict(self.tp_handler.plan)
        self.cp_comm_strategy = self.cp_handler.cp_comm_strategy
        for name in names:
            setattr(self, name, getattr(self.sp_handler, name))

    def _handler(self, name: str, kind: type, values: Mapping[str, Any]) -> Any:
        given, values = (
            getattr(self, name),
            {key: value for key, value in values.items() if value is not None},
        )
        if given is None:
            return kind(**values)
        if not isinstance(given, kind):
            raise ConfigurationError(
                f"{name} takes a {kind.__name__}", found=type(given).__name__, hint=f"{kind.__name__}(...)"
            )
        for key, value in values.items():
            if getattr(given, key) != value:
                raise ConfigurationError(
                    f"{name} says {key}={getattr(given, key)!r}, and ParallelismConfig {value!r}",
                    hint="leave out one of them",
                )
        return given

    # --- sizes -------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension, in the order of `DIMENSIONS`."""
        return {name: getattr(self, f"{name}_size") for name in DIMENSIONS}

    @property
    def active(self) -> dict[str, int]:
        """The dimensions that are used (their size is more than 1), with their sizes."""
        return {name: size for name, size in self.sizes.items() if size > 1}

    @property
    def total_size(self) -> int:
        """Number of processes: the product of all sizes."""
        return math.prod(self.sizes.values())

    @property
    def data_parallel_size(self) -> int:
        """Number of different batches of a step."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def non_data_parallel_size(self) -> int:
        """Number of processes that work on the same batch."""
        return self.cp_size * self.sp_size * self.tp_size

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether there are several replicas of the model."""
        return self.dp_replicate_size > 1

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether parameters are sharded over processes with different batches."""
        return self.dp_shard_size > 1

    @property
    def tp_enabled(self) -> bool:
        """Whether layers are spread over processes."""
        return self.tp_size > 1

    @property
    def cp_enabled(self) -> bool:
        """Whether sequences are spread, and keys and values exchanged."""
        return self.cp_size > 1

    @property
    def sp_enabled(self) -> bool:
        """Whether sequences are spread, and heads exchanged."""
        return self.sp_size > 1

    def describe(self) -> str:
        """Return the sizes as text: `dp_shard 2 x tp 2`."""
        return " x ".join(f"{name} {size}" for name, size in self.active.items()) or "1 process"

    # --- places ------------------------------------------------------------------------------------------

    def place(self, rank: int) -> dict[str, int]:
        """Return the index of a process in each dimension.

        Args:
            rank: Its index among all processes.
        """
        indices = {}
        for name, size in reversed(self.sizes.items()):
            rank, indices[name] = divmod(rank, size)
        return {name: indices[name] for name in DIMENSIONS}

    def data_share(self, topology: Topology) -> tuple[int, int]:
        """Return which of how many different batches of a step a process reads: `(index, count)`."""
        return topology.rank // self.non_data_parallel_size, self.data_parallel_size

    def check_world_size(self, processes: int, source: str) -> None:
        """Refuse a number of processes that is not the product of the sizes.

        Args:
            processes: Number of processes of the job.
            source: Who asked for the sizes, for messages.

        Raises:
            ConfigurationError: saying what was asked for, what was found and what to type.
        """
        if self.total_size == processes:
            return
        others = math.prod(size for name, size in self.sizes.items() if name != "dp_shard")
        hint = f"--num-processes {self.total_size}"
        if processes % others == 0:
            hint += f", or dp_shard_size={processes // others}"
        raise ConfigurationError(
            f"{source} asks for {self.describe()}, which takes {self.total_size} processes",
            found=f"{processes} process{'es' * (processes != 1)}",
            reason="the product of all sizes must be the number of processes",
            hint=hint,
        )
