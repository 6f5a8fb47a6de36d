"""Torchport on DeepSpeed: descriptors only; imports neither torch nor DeepSpeed. Public names come when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torchport.plugin import LauncherSpec, Requirements, StrategySpec, hookimpl, lazy_exports

if TYPE_CHECKING:
    from torchport_deepspeed.config import DeepSpeedPlugin, get_active_deepspeed_plugin
    from torchport_deepspeed.dummies import DummyOptim, DummyScheduler
    from torchport_deepspeed.engine import DeepSpeedEngineWrapper
    from torchport_deepspeed.helpers import gathered_parameters
    from torchport_deepspeed.wrappers import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper

_RUNTIME = ("deepspeed>=0.19,<0.20",)
_CONFIG = "torchport_deepspeed.config:DeepSpeedPlugin"


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer ZeRO: optimizer states, gradients and parameters partitioned over processes, or offloaded."""
    yield StrategySpec(
        name="deepspeed",
        aliases=("zero",),
        factory="torchport_deepspeed.strategy:DeepSpeedStrategy",
        config=_CONFIG,
        summary="DeepSpeed's engine: ZeRO 0 to 3, with offload",
        runtime=_RUNTIME,
        needs=Requirements(distributed=True),
        distributed_type="DEEPSPEED",
    )


@hookimpl
def torchport_launchers() -> Iterable[LauncherSpec]:
    """Offer DeepSpeed's own launcher, which reaches the machines of a hostfile."""
    yield LauncherSpec(
        name="deepspeed",
        factory="torchport_deepspeed.launcher:DeepSpeedLauncher",
        config=_CONFIG,
        summary="DeepSpeed's launcher: a hostfile, pdsh and others",
        runtime=_RUNTIME,
        features=frozenset({"machines"}),
    )


@hookimpl
def torchport_plan_resolved(plan: Any) -> Iterable[str]:
    """Refuse what DeepSpeed cannot do on the backend."""
    if plan.strategy != "deepspeed":
        return ()
    from torchport_deepspeed.check import check

    return check(plan)


_EXPORTS = {
    "DeepSpeedEngineWrapper": ".engine",
    "DeepSpeedOptimizerWrapper": ".wrappers",
    "DeepSpeedPlugin": ".config",
    "DeepSpeedSchedulerWrapper": ".wrappers",
    "DummyOptim": ".dummies",
    "DummyScheduler": ".dummies",
    "gathered_parameters": ".helpers",
    "get_active_deepspeed_plugin": ".config",
}

__all__ = [
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedPlugin",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "gathered_parameters",
    "get_active_deepspeed_plugin",
]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS)
