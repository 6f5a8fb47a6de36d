"""`torchport launch`: start a script in one or many processes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from torchport import aliases
from torchport.builtin.ranks import without_ranks
from torchport.cli import preflight
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Layer, Resolved, check_inert, resolve
from torchport.config.schema import Setting
from torchport.errors import ConfigurationError
from torchport.plan.discovery import discover
from torchport.plan.registry import Installed, load_reference
from torchport.plan.selection import Request, check_names, choose_backend, choose_launcher
from torchport.plugin.launcher import Job, Launcher

if TYPE_CHECKING:
    from torchport.config.plugins import PluginSettings

_ALL_DEVICES = "all"


def _option(item: Setting, **attributes: Any) -> click.Option:
    """Make the flag of a setting. Values are texts: the setting itself converts and checks them."""
    name = f"--{item.flag}"
    short = [f"-{item.short}"] if item.short else []
    if item.is_flag:
        return click.Option(
            [f"{name}/{_opposite(item.flag)}", *short, item.name],
            default=None,
            help=_help(item),
            **attributes,
        )
    return click.Option(
        [name, *short, item.name],
        default=None,
        type=str,
        metavar=_metavar(item),
        help=_help(item),
        **attributes,
    )


def _opposite(flag: str) -> str:
    return f"--{flag.removeprefix('no-')}" if flag.startswith("no-") else f"--no-{flag}"


def _help(item: Setting) -> str:
    default = item.default
    shown = item.name if default in (None, "", (), False) or item.is_flag else ""
    return item.help if shown else f"{item.help} [default: {schema.as_text(default)}]"


def _metavar(item: Setting) -> str:
    if item.choices:
        return "|".join(item.choices)
    return {"int": "N", "float": "X"}.get(
        str(item.type).replace(" | None", "").replace("<class '", "").rstrip("'>"), "TEXT"
    )


_SETTINGS = {item.name: item for item in schema.settings_of(LaunchConfig) if item.flag}


def _alias(flag: str) -> str:
    """The parameter that holds an older spelling."""
    return f"alias_{flag.replace('-', '_')}"


class LaunchCommand(click.Command):
    """A command whose flags are those of `LaunchConfig`, and of installed plugins when one is asked for."""

    def __init__(self, **attributes: Any) -> None:
        options: list[click.Parameter] = [_option(item) for item in _SETTINGS.values()]
        for flag in (*aliases.FLAGS, *aliases.INERT_FLAGS):
            options.append(click.Option([f"--{flag}", _alias(flag)], default=None, type=str, hidden=True))
        for flag in (*aliases.SWITCHES, *aliases.RETIRED_SWITCHES):
            options.append(click.Option([f"--{flag}", _alias(flag)], is_flag=True, default=None, hidden=True))
        arguments = [
            click.Argument(["script"], type=click.UNPROCESSED),
            click.Argument(["script_args"], nargs=-1, type=click.UNPROCESSED),
        ]
        super().__init__(
            name="launch",
            params=[*options, *arguments],
            callback=_run,
            context_settings={
                "allow_interspersed_args": False,
                "token_normalize_func": lambda token: token.replace("_", "-"),
            },
            **attributes,
        )
        self._plugin_options: dict[str, click.Option] | None = None
        self._broken: dict[str, str] = {}
        self.plugins: list[PluginSettings] = []

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the core's flags, and those of plugins once they are known."""
        return [*super().get_params(ctx), *(self._plugin_options or {}).values()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse with the core's flags; where that does not do, look at what plugins bring and parse again."""
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            self._load_plugins()
            try:
                return super().parse_args(ctx, self._spell_out_booleans(ctx, args))
            except click.NoSuchOption as second:
                raise click.NoSuchOption(
                    second.option_name,
                    message=_unknown_flag(second.option_name, self._broken),
                    possibilities=second.possibilities,
                    ctx=ctx,
                ) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the core's flags, then each plugin's, then the older spellings."""
        super().format_options(ctx, formatter)
        self._load_plugins()
        shown = set(_SETTINGS)
        for plugin in self.plugins:
            rows = []
            for flag, item in plugin.by_flag.items():
                option = (self._plugin_options or {}).get(flag)
                if option is None or flag in shown or flag != item.flag:  # or an older name of it
                    continue
                option.hidden = False  # hidden from the core's own list only
                record = option.get_help_record(ctx)
                if record is not None:
                    rows.append((record[0], item.help))
                    shown.add(flag)
            if rows:
                with formatter.section(f"Settings of {plugin.title}"):
                    formatter.write_dl(rows)
        for plugin_name, reason in self._broken.items():
            formatter.write_paragraph()
            formatter.write_text(f"The settings of {plugin_name} could not be read: {reason}")
        older = sorted((*aliases.FLAGS, *aliases.INERT_FLAGS, *aliases.SWITCHES, *aliases.RETIRED_SWITCHES))
        formatter.write_paragraph()
        formatter.write_text(
            f"Older spellings are understood too: {', '.join(f'--{flag}' for flag in older)}."
        )

    def _spell_out_booleans(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Turn a plugin's documented `--flag true` and `--flag false` into `--flag` and `--no-flag`."""
        valued = {
            name
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and not option.is_flag
            for name in option.opts
        }
        spelled: list[str] = []
        rest = list(args)
        while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):  # up to the script
            token = rest.pop(0)
            flag, equals, value = token[2:].replace("_", "-").partition("=")
            option = (self._plugin_options or {}).get(flag) if token.startswith("--") else None
            if option is not None and option.is_flag:
                if not equals and rest and rest[0].lower() in ("true", "false"):
                    value = rest.pop(0)
                spelled.append(f"--no-{flag}" if value.lower() == "false" else f"--{flag}")
                continue
            spelled.append(token)
            if token.replace("_", "-") in valued and rest:
                spelled.append(rest.pop(0))
        return spelled + rest

    def _load_plugins(self) -> None:
        if self._plugin_options is not None:
            return
        from torchport.config.plugins import plugin_settings

        self._plugin_options = {}
        self.plugins, self._broken = plugin_settings(discover(os.environ))
        known = {item.flag for item in _SETTINGS.values()}
        for plugin in self.plugins:
            for flag, item in plugin.by_flag.items():
                if flag not in known and flag not in self._plugin_options:
                    named = item._replace(flag=flag, name=f"plugin_{flag.replace('-', '_')}", short="")
                    self._plugin_options[flag] = _option(named, hidden=True)


def _unknown_flag(name: str, broken: Mapping[str, str]) -> str:
    from torchport.config.plugins import unreadable

    owner = aliases.plugin_of(name)
    hint = f" It belongs to a plugin: pip install torchport-{owner}" if owner else ""
    reason = unreadable(broken)
    return f"No such option {name!r}.{hint}{f' ({reason})' * bool(reason)}"


def _run(script: str, script_args: tuple[str, ...], **values: Any) -> None:
    """Turn the command line into a job and run it."""
    flags, plugin_flags = _read_flags(values)
    sys.exit(launch_script(flags, plugin_flags, script, script_args, os.environ))


def _read_flags(values: Mapping[str, Any]) -> tuple[Layer, dict[str, str]]:
    """Sort what was given on the command line into settings of the launch and settings of plugins."""
    layer, plugins = Layer(), {}
    for name, value in values.items():
        if value is None:
            continue
        flag = name.removeprefix("alias_").replace("_", "-")
        if name in _SETTINGS:
            item = _SETTINGS[name]
            layer.put(name, value, _opposite(item.flag) if value is False else f"--{item.flag}")
        elif name.startswith("plugin_"):
            plugins[name.removeprefix("plugin_").replace("_", "-")] = str(value)
        elif flag in aliases.FLAGS:
            layer.put(aliases.FLAGS[flag], value, f"--{flag}")
        elif flag in aliases.SWITCHES:
            layer.fill(aliases.SWITCHES[flag], f"--{flag}")
        elif flag in aliases.RETIRED_SWITCHES:
            click.echo(f"torchport: --{flag} has no effect: {aliases.RETIRED_SWITCHES[flag]}", err=True)
        else:
            check_inert(aliases.INERT_FLAGS[flag], value, f"--{flag}")
    return layer, plugins


def launch_script(
    flags: Layer,
    plugin_flags: Mapping[str, str],
    script: str,
    arguments: Iterable[str],
    environ: Mapping[str, str],
) -> int:
    """Run a script as configured; the same as `torchport launch`.

    Args:
        flags: Settings from the command line.
        plugin_flags: Settings of plugins from the command line, by flag.
        script: The script, module or program.
        arguments: Its arguments.
        environ: The environment to start from.

    Returns:
        The exit code of the job. A launcher may also replace this process and not return.

    Raises:
        TorchportError: if the job cannot be started as asked for.
    """
    resolved = resolve(flags, environ)
    installed = discover(environ)
    check_names(Request(), resolved.environ, installed)
    if plugin_flags or any(content for content in resolved.sections.values()):
        from torchport.config.plugins import apply_settings, plugin_settings

        plugins, broken = plugin_settings(installed)
        resolved = apply_settings(resolved, plugin_flags, plugins, broken)
    request = Request(settings=resolved.sections, config_file=resolved.config_file)
    words = tuple(arguments)
    job = make_job(resolved, request, installed, script, words)
    decision = choose_launcher(request, resolved.environ, installed, _features(resolved.config))
    if decision.spec is None:
        raise TypeError("the launcher slot is empty")
    if not resolved.config.quiet:
        misplaced = preflight.misplaced_flags(resolved, job.num_processes, script, words)
        for sentence in (*resolved.overrides, *misplaced):
            click.echo(f"torchport: {sentence}", err=True)
    launcher: Launcher = load_reference(decision.spec.factory)(decision.spec, decision.config)
    return launcher.launch(job)


def make_job(
    resolved: Resolved, request: Request, installed: Installed, script: str, arguments: tuple[str, ...]
) -> Job:
    """Check everything that can be checked before a process is started, and describe the job.

    Raises:
        TorchportError: if it cannot work.
    """
    config = resolved.config
    command = preflight.worker_command(resolved, script, arguments)
    environ = without_ranks(resolved.environ)
    devices = tuple(part.strip() for part in config.device_ids.split(",") if part.strip())
    chosen = devices != (_ALL_DEVICES,) and devices
    num_processes = config.num_processes
    mesh, asked = preflight.mesh(resolved, request, installed)
    if num_processes is None and mesh is not None and not chosen:
        num_processes = mesh.total_size
    if num_processes is None or chosen:
        backend: Any = choose_backend(request, resolved.environ, installed).spec
        if chosen:
            environ |= _visible(backend, devices, resolved)
        if num_processes is None:
            each = len(devices) if chosen else max(1, installed.probe(backend).count)
            num_processes = each * max(1, config.num_machines)
    preflight.check_shape(resolved, num_processes)
    preflight.check_values(resolved)
    preflight.check_outer_ranks(resolved.environ, num_processes)
    if mesh is not None:
        mesh.check_world_size(num_processes, asked)
    preflight.check_port(resolved)
    return Job(
        command=command,
        environ=environ,
        num_processes=num_processes,
        num_machines=config.num_machines,
        machine_rank=config.machine_rank,
        main_process_ip=config.main_process_ip,
        main_process_port=config.main_process_port,
        log_dir=preflight.check_log_dir(resolved),
        tee=config.tee,
        log_prefix=config.log_prefix,
        quiet=config.quiet,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        rdzv_backend=config.rdzv_backend,
        rdzv_conf=config.rdzv_conf,
        rdzv_id=config.rdzv_id,
        role=config.role,
        host_file=config.host_file,
        extra_args=tuple(shlex.split(config.launcher_args)),
    )


def _features(config: LaunchConfig) -> frozenset[str]:
    """Name what the launcher must be able to do."""
    rendezvous = config.rdzv_backend not in ("", "static") or config.rdzv_id or config.rdzv_conf
    wanted = {
        "machines": config.num_machines > 1,
        "restarts": config.max_restarts > 0,
        "rendezvous": bool(rendezvous),
    }
    return frozenset(feature for feature, needed in wanted.items() if needed)


def _visible(backend: Any, devices: tuple[str, ...], resolved: Resolved) -> dict[str, str]:
    """Restrict a job to some devices of this machine, through the variable that the vendor's runtime reads."""
    if not backend.visible_devices_env:
        raise ConfigurationError(
            f"{resolved.origins['device_ids']} chooses devices {', '.join(devices)}",
            reason=f"the backend {backend.name!r} has no devices to choose among",
            hint="leave it out, or choose another --backend",
        )
    return {backend.visible_devices_env: ",".join(devices)}


launch = LaunchCommand(
    short_help="Start a script in one or many processes.",
    help="""Start SCRIPT in one or many processes; what follows it belongs to the script.

    A flag comes before an environment variable, and that before the file given by --config-file. Words may be
    joined by - or _.""",
)
"""The command."""
