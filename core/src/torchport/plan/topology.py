"""Where this process stands in its job, as the installed launchers read it from the environment."""

from __future__ import annotations

from collections.abc import Mapping

from torchport import envvars
from torchport.errors import LaunchError
from torchport.plan.registry import Installed, load_reference
from torchport.plugin.installation import missing_runtime
from torchport.plugin.launcher import Launcher
from torchport.plugin.specs import LauncherSpec, Topology


def detect_topology(environ: Mapping[str, str], installed: Installed) -> Topology:
    """Ask the installed launchers, the most specific last, and take the first answer.

    Launchers with a priority above 0 are asked first: `torchrun` and `local` set complete variables, also
    when they run inside an allocation of a cluster's scheduler. Where their variables are not complete, another
    launcher may have set them.

    Raises:
        LaunchError: if a launcher's variables contradict themselves, and no other launcher knows them.
    """
    problem: LaunchError | None = None
    for spec in sorted(installed.specs("launcher"), key=lambda spec: (-spec.priority, spec.name)):
        launcher = _build(spec, installed)
        if launcher is None:
            continue
        try:
            topology = launcher.detect(environ)
        except ValueError as error:
            problem = problem or LaunchError(
                f"the variables of launcher {spec.name!r} do not describe a place in a job",
                reason=str(error),
                hint="unset them, start the script with `torchport launch`, or set "
                f"{envvars.LOCAL_RANK} and {envvars.LOCAL_WORLD_SIZE} too"
                if environ.get(envvars.RANK) and not environ.get(envvars.LOCAL_RANK)
                else "unset them, or start the script with `torchport launch`",
            )
            continue
        if topology is not None:
            return topology
    if problem is not None:
        raise problem
    return Topology()


def _build(spec: LauncherSpec, installed: Installed) -> Launcher | None:
    """Build a launcher; one that cannot be imported here has not started this process either."""
    if missing_runtime(spec.runtime):
        return None
    try:
        launcher: Launcher = load_reference(spec.factory)(spec)
    except Exception as error:
        sentence = (
            f"launcher {spec.name!r} could not be asked for the place of this process in a job:"
            f" {type(error).__name__}: {error} (see torchport doctor)"
        )
        if sentence not in installed.warnings:
            installed.warnings.append(sentence)
        return None
    return launcher
