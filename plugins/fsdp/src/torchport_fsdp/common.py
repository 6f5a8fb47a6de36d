"""What both versions share: the run around a model before and after it is sharded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchport.errors import ConfigurationError
from torchport.plugin import RunContext, Strategy
from torchport.plugin.shards import FORMAT

from torchport_fsdp.config import FullyShardedDataParallelPlugin, StateDictType
from torchport_fsdp.mesh import Layout, data_mesh, draw_alike, lay_out
from torchport_fsdp.parameters import upcast_trainable

_ADDED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """Return a parameter's name in the user's own model, without the wrappers around its modules."""
    return _ADDED.sub("", name)


class ShardedStrategy(Strategy):
    """What FSDP1 and FSDP2 have in common."""

    config: FullyShardedDataParallelPlugin
    steps_together = True

    def __init__(self, spec: Any, config: FullyShardedDataParallelPlugin | None = None) -> None:
        super().__init__(spec, config or FullyShardedDataParallelPlugin())
        self._mesh: DeviceMesh | None = None
        self._layout: Layout | None = None

    @property
    def shards(self) -> str:
        """The format of sharded checkpoints, unless whole ones are asked for."""
        return FORMAT if self.config.state_dict_type is StateDictType.SHARDED_STATE_DICT else ""

    def mesh(self, context: RunContext) -> DeviceMesh:
        """Return the mesh over which parameters are sharded, made when the first model is prepared."""
        layout = self.layout(context)
        if layout is not None:
            return layout.data
        if self._mesh is None:
            self._mesh = data_mesh(context.device.type, context.topology, self.config)
        return self._mesh

    def layout(self, context: RunContext) -> Layout | None:
        """Return the meshes of the run, where the plan asks for one."""
        if self._layout is None and self.parallelism is not None:
            self._layout = lay_out(context.device.type, self.parallelism)
            if self._layout.tensor is not None:
                draw_alike(self._layout.tensor, context)
        return self._layout

    def device_mesh(self, context: RunContext) -> DeviceMesh | None:
        """Return the mesh of the run, with its dimensions by name; `None` where the plan asks for none."""
        layout = self.layout(context)
        return None if layout is None else layout.whole

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which every process but rank 0 makes models without memory, if so configured."""
        if self.config.cpu_ram_efficient_loading and dist.is_initialized() and dist.get_rank() != 0:
            return torch.device("meta")
        return nullcontext()

    def join(
        self, models: Iterable[torch.nn.Module], *, even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        """Return an empty context: a step takes all processes, and the run lends batches (`steps_together`)."""
        return nullcontext()

    def check_meta(self, model: torch.nn.Module) -> None:
        """Refuse a model without values that nothing would fill.

        Raises:
            ConfigurationError: on the process where it is so.
        """
        config = self.config
        empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
        filled = config.param_init_fn is not None or (
            config.cpu_ram_efficient_loading and dist.get_rank() != 0
        )
        if empty and not filled:
            raise ConfigurationError(
                f"parameters of the model have no values: {', '.join(empty[:3])}",
                found=f"they are on the meta device of rank {dist.get_rank()}",
                hint="cpu_ram_efficient_loading=True with the real weights on rank 0, or param_init_fn",
            )

    def upcast(self, model: torch.nn.Module, context: RunContext) -> None:
        """Hold trainable 16-bit parameters in float32 under mixed precision, and say so once."""
        if context.precision.compute_dtype is None or not (changed := upcast_trainable(model)):
            return
        if context.topology.rank == 0:
            print(  # noqa: T201
                f"torchport: {changed} trainable 16-bit parameters of {type(model).__name__} are held in float32,"
                f" and computed with in {context.precision.compute_dtype};"
                " precision 'no' leaves them as they are",
                file=sys.stderr,
            )


def dtype_of(value: Any) -> torch.dtype | None:
    """Return a dtype given as one, or by its name."""
    if value is None or isinstance(value, torch.dtype):
        return value
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    found = getattr(torch, names.get(str(value), str(value)), None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"{value!r} is not a dtype", hint="bfloat16, float16 or float32")
    return found


def policy_fields(policy: Any, compute: torch.dtype | None, names: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a mixed-precision policy that are set.

    Without a policy, parameters are gathered in the precision's dtype, and gradients are added up in float32.

    Args:
        policy: `None`, the name of a dtype, a dictionary, or an object of either version's class.
        compute: The precision's dtype; `None` keeps the parameters' own.
        names: The fields that the version knows.
    """
    known = tuple(names)
    if policy is None:
        return {} if compute is None else {"param_dtype": compute, "reduce_dtype": torch.float32}
    if isinstance(policy, (str, torch.dtype)):
        return {"param_dtype": dtype_of(policy), "reduce_dtype": torch.float32}
    given = (
        policy if isinstance(policy, dict) else {n: getattr(policy, n) for n in known if hasattr(policy, n)}
    )
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(
            f"mixed_precision_policy has no field {unknown[0]!r}", found=", ".join(known), hint="one of these"
        )
    return {
        name: dtype_of(value) if name.endswith("_dtype") else value
        for name, value in given.items()
        if value is not None
    }


def offloads(config: Any, *, default: bool) -> tuple[bool, bool]:
    """Return whether whole states go to host memory, and whether only rank 0 gets them."""
    return (
        bool(getattr(config, "offload_to_cpu", default)),
        bool(getattr(config, "rank0_only", default)),
    )


Place = Callable[[torch.Tensor], torch.Tensor]
