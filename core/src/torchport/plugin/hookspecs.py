"""Every hook of Torchport, in one file.

Hooks are called at set-up and tear-down only, never in a training step. All of them collect: what every
plugin returns is put together, so the order of installation decides nothing. Return descriptors (or yield
them); `docs/hooks.md` has a runnable example of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torchport.plan.selection import Plan
    from torchport.plugin.specs import (
        BackendSpec,
        CollectivesSpec,
        CommandSpec,
        Finding,
        LauncherSpec,
        PrecisionSpec,
        QuantizerSpec,
        StrategySpec,
        TrackerSpec,
    )

PROJECT = "torchport"
"""pluggy's project name, and the entry-point group that plugins register under."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def torchport_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Offer kinds of device."""


@hookspec
def torchport_collectives() -> Iterable[CollectivesSpec]:  # type: ignore[empty-body]
    """Offer ways for processes to exchange tensors."""


@hookspec
def torchport_precisions() -> Iterable[PrecisionSpec]:  # type: ignore[empty-body]
    """Offer number formats to work in."""


@hookspec
def torchport_strategies() -> Iterable[StrategySpec]:  # type: ignore[empty-body]
    """Offer layouts of model, optimizer and gradients over processes."""


@hookspec
def torchport_launchers() -> Iterable[LauncherSpec]:  # type: ignore[empty-body]
    """Offer ways to bring processes to life."""


@hookspec
def torchport_trackers() -> Iterable[TrackerSpec]:  # type: ignore[empty-body]
    """Offer places where metrics go."""


@hookspec
def torchport_quantizers() -> Iterable[QuantizerSpec]:  # type: ignore[empty-body]
    """Offer ways to store weights in fewer bits."""


@hookspec
def torchport_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Offer sub-commands of `torchport`, imported when they are called."""


@hookspec
def torchport_plan_resolved(plan: Plan) -> Iterable[str] | None:
    """Look at the plan before anything is built from it; return sentences to tell the operator once, or veto it.

    Sentences join `Plan.warnings`: `torchport plan` shows them, and the main process of a run says them once. A
    veto is a `TorchportError`, raised.
    """


@hookspec
def torchport_findings() -> Iterable[Finding]:  # type: ignore[empty-body]
    """Tell `torchport doctor` what an operator should know about this machine."""
