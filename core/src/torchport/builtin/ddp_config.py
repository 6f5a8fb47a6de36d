"""Settings of the strategy `ddp`. Imports no torch: the command line reads them for `--help`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from torchport.config.kwargs import KwargsHandler
from torchport.config.schema import setting


class DDPCommunicationHookType(str, enum.Enum):
    """How gradients are compressed on their way between processes.

    See https://pytorch.org/docs/stable/ddp_comm_hooks.html for each hook.
    """

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


_HOOKS = tuple(hook.value for hook in DDPCommunicationHookType)


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """How the model is wrapped in `torch.nn.parallel.DistributedDataParallel`.

    Attributes: as the parameters of that class, and:
        comm_hook: How gradients are compressed on their way.
        comm_wrapper: A cast (`no`, `fp16`, `bf16`) around `comm_hook`.
        comm_state_option: Arguments of the hook's state (PowerSGD: `matrix_approximation_rank`, …).
    """

    __torchport_prefix__: ClassVar[str] = "ddp"

    dim: int = setting(0, help="Dimension along which inputs are scattered.")
    broadcast_buffers: bool = setting(True, help="Copy rank 0's buffers to all ranks before each forward.")
    bucket_cap_mb: int = setting(25, help="Size in MiB of the buckets in which gradients are exchanged.")
    find_unused_parameters: bool = setting(False, help="Look for parameters that a forward did not use.")
    check_reduction: bool = setting(False, help="Accepted for compatibility; PyTorch ignores it.")
    gradient_as_bucket_view: bool = setting(False, help="Let gradients be views into the buckets.")
    static_graph: bool = setting(False, help="Promise that every iteration uses the same parameters.")
    comm_hook: DDPCommunicationHookType = setting(
        DDPCommunicationHookType.NO, help="How gradients are compressed on their way.", choices=_HOOKS
    )
    comm_wrapper: DDPCommunicationHookType = setting(
        DDPCommunicationHookType.NO, help="A cast around the hook.", choices=("no", "fp16", "bf16")
    )
    comm_state_option: dict[str, Any] = setting(
        default_factory=dict, help="Arguments of the hook's state; as a variable, in JSON.", flag=""
    )

    def __post_init__(self) -> None:
        self.comm_hook = DDPCommunicationHookType(self.comm_hook)
        self.comm_wrapper = DDPCommunicationHookType(self.comm_wrapper)
        if self.comm_wrapper.value not in ("no", "fp16", "bf16"):
            raise ValueError(f"comm_wrapper must be no, fp16 or bf16, found {self.comm_wrapper.value!r}")
