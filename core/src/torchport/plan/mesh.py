"""Which mesh the processes of a job form, and whether the chosen strategy can lay models out over it."""

from __future__ import annotations

from torchport import aliases
from torchport.config import schema
from torchport.errors import ConfigurationError, IncompatibleError
from torchport.plan.decision import Decision
from torchport.plan.request import Sources, slot_variable
from torchport.plugin.parallelism import TITLES, ParallelismConfig


def mesh_asked_for(sources: Sources) -> tuple[ParallelismConfig | None, str]:
    """Return the mesh that was asked for, and by whom; `None` where all sizes are 1.

    An argument comes before variables, and these before the configuration file.

    Raises:
        ConfigurationError: if a size or a setting is not valid.
    """
    request, section = sources.request, schema.section_of(ParallelismConfig)
    if request.parallelism is not None:
        if not isinstance(request.parallelism, ParallelismConfig):
            raise ConfigurationError(
                f"{request.asked_by} parallelism_config takes a ParallelismConfig",
                found=type(request.parallelism).__name__,
            )
        mesh, source = request.parallelism, f"{request.asked_by} parallelism_config=ParallelismConfig(...)"
        return (mesh, source) if mesh.total_size > 1 else (None, "")
    where = f"{request.config_file}: {section}"
    given = schema.from_mapping(ParallelismConfig, request.settings.get(section, {}), where)
    read = schema.from_environment(ParallelismConfig, sources.environment)
    values = {name: value for name, value in (given | read).items() if value is not None}
    if not values:
        return None, ""
    mesh = ParallelismConfig(**values)
    variables = {item.name: item.env for item in schema.settings_of(ParallelismConfig)}
    named = [f"{name}_size" for name in mesh.active]
    said = [sources.variable_source(variables[name]) if name in read else where for name in named]
    return (mesh, ", ".join(dict.fromkeys(said))) if mesh.total_size > 1 else (None, "")


def check_mesh(mesh: ParallelismConfig, source: str, strategy: Decision, sources: Sources) -> None:
    """Refuse a mesh with dimensions that the strategy cannot lay out.

    Raises:
        IncompatibleError: naming them, and a strategy that can.
    """
    able = getattr(strategy.spec, "parallelism", ())
    lacking = [name for name in mesh.active if name not in able]
    problem = getattr(strategy.config, "parallelism_problem", None)
    reason = "" if lacking or problem is None else problem(mesh)
    if lacking:
        asked = ", ".join(f"{TITLES[name]} ({name}_size={mesh.sizes[name]})" for name in lacking)
        reason = f"the strategy {strategy.name!r} cannot do {asked}"
    if not reason:
        return
    others = [
        spec.name
        for spec in sources.installed.specs("strategy")
        if spec.name != strategy.name and set(mesh.active) <= set(spec.parallelism)
    ]
    hint = f"--strategy {others[0]}, or {slot_variable('strategy')}={others[0]}" if others else ""
    if lacking and not others:
        hint = f"pip install torchport-{aliases.MESH_PLUGIN}, and the strategy {aliases.MESH_PLUGIN!r}"
    raise IncompatibleError(
        f"{source} asks for {mesh.describe()}",
        found=f"strategy {strategy.name!r} ({strategy.source})",
        reason=reason,
        hint=hint if lacking else "",
    )
