"""From a request, the environment and what is installed to a frozen, explained `Plan`.

`plan()` is a pure function: it imports no torch and keeps no state. Whatever looks at the machine (probes,
capabilities) is asked of `Installed`, so that the whole table of decisions can be tested without hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchport import envvars
from torchport.plan import slots
from torchport.plan.decision import AUTOMATIC, Decision, Plan, Rejection, plain
from torchport.plan.registry import Installed
from torchport.plan.request import (
    SLOTS,
    Request,
    Sources,
    find_spec,
    slot_kind,
    slot_variable,
    split_names,
)
from torchport.plugin.specs import BackendSpec, Topology

__all__ = [
    "AUTOMATIC",
    "SLOTS",
    "Decision",
    "Plan",
    "Rejection",
    "Request",
    "check_names",
    "choose_backend",
    "choose_launcher",
    "plain",
    "plan",
    "slot_variable",
]


def plan(request: Request, environment: Mapping[str, str], installed: Installed, topology: Topology) -> Plan:
    """Fill every slot, or say exactly why one cannot be filled.

    An argument comes before the environment, the environment before the configuration file, and that before
    automatic choice. Nothing that was asked for is ever replaced by something else.

    Args:
        request: Arguments and the contents of a configuration file.
        environment: Environment variables.
        installed: What discovery found.
        topology: The place of this process in its job.

    Raises:
        SelectionError: if a slot cannot be filled.
        ConfigurationError: if a plugin's settings are not valid, those of another strategy were given where
            nobody asked for one, or the mesh has another number of processes.
        TorchportError: if a plugin vetoes the plan (`torchport_plan_resolved`).
    """
    from torchport.plan.mesh import check_mesh, mesh_asked_for

    sources = Sources(request, environment, installed)
    backend = slots.fill_backend(sources)
    device = _backend_spec(backend)
    slots.check_processes(backend, device, topology)
    mesh, mesh_source = mesh_asked_for(sources)
    if mesh is not None:
        mesh.check_world_size(topology.world_size, mesh_source)
    strategy = slots.fill_strategy(sources, device, topology)
    if mesh is not None and request.lays_out:
        check_mesh(mesh, mesh_source, strategy, sources)
    unused = _unused_settings(strategy, sources) if request.lays_out else ()
    distributed = slots.needs_process_group(strategy, topology)
    decisions = (
        backend,
        strategy,
        slots.fill_precision(sources, device, strategy),
        slots.fill_collectives(sources, device, distributed=distributed),
        slots.fill_optional("launcher", sources),
        slots.fill_trackers(sources),
        slots.fill_quantizer(sources, device),
    )
    made = Plan(
        decisions=decisions,
        topology=topology,
        distributed=distributed,
        overrides=sources.overrides(),
        parallelism=mesh,
        parallelism_source=mesh_source,
        warnings=(
            *installed.warnings,
            *_failures_passed_over(backend, installed),
            *_unread(environment),
            *unused,
        ),
    )
    said = [sentence for observe in installed.observers for sentence in observe(made) or ()]
    return replace(made, warnings=(*made.warnings, *said)) if said else made


def check_names(request: Request, environment: Mapping[str, str], installed: Installed) -> None:
    """Check, without probing anything, that each plugin asked for is installed under that name."""
    sources = Sources(request, environment, installed)
    for slot in SLOTS:
        ask = sources.ask(slot)
        if ask is not None:
            for value in split_names(ask.value) if slot == "trackers" else (ask.value,):
                find_spec(slot_kind(slot), value, ask.source, installed)


def choose_launcher(
    request: Request, environment: Mapping[str, str], installed: Installed, features: frozenset[str]
) -> Decision:
    """Fill the launcher slot alone, for `torchport launch`.

    Args:
        request: As for `plan`.
        environment: As for `plan`.
        installed: As for `plan`.
        features: What the launcher must be able to do (`LauncherSpec.features`).
    """
    return slots.fill_launcher(Sources(request, environment, installed), features)


def choose_backend(request: Request, environment: Mapping[str, str], installed: Installed) -> Decision:
    """Fill the backend slot alone, for whoever needs its probe only."""
    return slots.fill_backend(Sources(request, environment, installed))


def _backend_spec(decision: Decision) -> BackendSpec:
    if not isinstance(decision.spec, BackendSpec):
        raise TypeError(f"the backend slot is filled by {decision.spec!r}")
    return decision.spec


def _unused_settings(strategy: Decision, sources: Sources) -> tuple[str, ...]:
    """Look at the settings of other strategies, where a flag or the file has given any of a plugin."""
    if all(map(envvars.is_own, envvars.origins(sources.environment))):
        return ()
    from torchport.plan.unused import unused_settings

    return unused_settings(strategy, sources)


def _unread(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Say that the configuration file which a variable names has not been read: this process was not launched."""
    path = environment.get(envvars.CONFIG_FILE)
    if not path or envvars.CONFIG_FILE in envvars.origins(environment):
        return ()
    return (
        f"{envvars.CONFIG_FILE}={path} is not read here: start the script with `torchport launch`,"
        f" or unset {envvars.CONFIG_FILE}",
    )


def _failures_passed_over(backend: Decision, installed: Installed) -> tuple[str, ...]:
    """Say that an automatic choice was made while plugins that might have won could not be registered."""
    if not backend.automatic:
        return ()
    return tuple(
        f"backend {backend.name!r} was chosen while plugin {failure.plugin.name!r} ({failure.plugin}) could"
        f" not be registered: {failure.reason.splitlines()[0]} (see torchport doctor)"
        for failure in installed.failures
    )
