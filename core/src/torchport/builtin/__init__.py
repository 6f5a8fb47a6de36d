"""The core's own plugins, registered through the same public hooks as everybody's."""

from __future__ import annotations

from collections.abc import Iterable

from torchport.plugin.hookspecs import hookimpl
from torchport.plugin.specs import LauncherSpec, PrecisionSpec, Requirements, StrategySpec, TrackerSpec


@hookimpl
def torchport_precisions() -> Iterable[PrecisionSpec]:
    """Offer full precision and the two 16-bit formats of `torch.autocast`."""
    yield PrecisionSpec(
        name="no",
        aliases=("fp32",),
        factory="torchport.builtin.precisions:FullPrecision",
        summary="every tensor keeps its own dtype",
        default=True,
    )
    yield PrecisionSpec(
        name="bf16",
        aliases=("bfloat16",),
        factory="torchport.builtin.precisions:BFloat16",
        summary="autocast to bfloat16",
        needs=Requirements(autocast=frozenset({"bfloat16"})),
    )
    yield PrecisionSpec(
        name="fp16",
        aliases=("float16",),
        factory="torchport.builtin.precisions:Float16",
        summary="autocast to float16 with loss scaling",
        needs=Requirements(autocast=frozenset({"float16"}), grad_scaler=True),
    )


@hookimpl
def torchport_strategies() -> Iterable[StrategySpec]:
    """Offer one process, and data parallelism over several."""
    yield StrategySpec(
        name="single",
        factory="torchport.builtin.single:SingleStrategy",
        summary="one process, the model as it is",
        priority=10,
        max_processes=1,
    )
    yield StrategySpec(
        name="ddp",
        factory="torchport.builtin.ddp:DdpStrategy",
        config="torchport.builtin.ddp_config:DistributedDataParallelKwargs",
        summary="a replica of the model in each process, gradients averaged",
        needs=Requirements(distributed=True),
        priority=10,
        min_processes=2,
        parallelism=("dp_replicate",),
    )


@hookimpl
def torchport_launchers() -> Iterable[LauncherSpec]:
    """Offer processes on this machine, and torchrun's elastic agent for the rest."""
    yield LauncherSpec(
        name="local",
        factory="torchport.builtin.local:LocalLauncher",
        summary="processes on this machine, without importing torch",
        priority=100,
    )
    yield LauncherSpec(
        name="torchrun",
        factory="torchport.builtin.torchrun:TorchrunLauncher",
        summary="torchrun's elastic agent: several machines, restarts, rendezvous",
        priority=50,
        features=frozenset({"machines", "restarts", "rendezvous"}),
    )


@hookimpl
def torchport_trackers() -> Iterable[TrackerSpec]:
    """Offer metrics as lines of JSON in a file."""
    yield TrackerSpec(
        name="jsonl",
        factory="torchport.builtin.jsonl:JsonLinesTracker",
        summary="one JSON object a line, readable while training",
    )
