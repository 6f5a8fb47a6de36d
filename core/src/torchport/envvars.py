"""Every environment variable that the core itself reads or sets, in one place.

Variables of plugins' settings are derived from their configuration dataclasses (`config/schema.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable and what it does."""

    name: str
    help: str


BACKEND = "TORCHPORT_BACKEND"
STRATEGY = "TORCHPORT_STRATEGY"
PRECISION = "TORCHPORT_PRECISION"
COLLECTIVES = "TORCHPORT_COLLECTIVES"
LAUNCHER = "TORCHPORT_LAUNCHER"
TRACKERS = "TORCHPORT_TRACKERS"
TRACKERS_STRICT = "TORCHPORT_TRACKERS_STRICT"
QUANTIZER = "TORCHPORT_QUANTIZER"
PLUGINS = "TORCHPORT_PLUGINS"
DISABLE_PLUGINS = "TORCHPORT_DISABLE_PLUGINS"
ACCUMULATION_STEPS = "TORCHPORT_GRADIENT_ACCUMULATION_STEPS"
CONFIG_FILE = "TORCHPORT_CONFIG_FILE"
DEBUG = "TORCHPORT_DEBUG"
TIMEOUT = "TORCHPORT_TIMEOUT"
LOG_LEVEL = "TORCHPORT_LOG_LEVEL"
BIND_CPU = "TORCHPORT_BIND_CPU"
DYNAMO_BACKEND = "TORCHPORT_DYNAMO_BACKEND"
DYNAMO_MODE = "TORCHPORT_DYNAMO_MODE"
DYNAMO_FULLGRAPH = "TORCHPORT_DYNAMO_USE_FULLGRAPH"
DYNAMO_DYNAMIC = "TORCHPORT_DYNAMO_USE_DYNAMIC"
DYNAMO_REGIONS = "TORCHPORT_DYNAMO_USE_REGIONAL_COMPILATION"
RESUME = "TORCHPORT_RESUME"
ORIGINS = "TORCHPORT_ORIGINS"
PARALLELISM = "PARALLELISM_CONFIG_"
"""How the names of the variables of a `ParallelismConfig` begin."""
RANK = "RANK"
WORLD_SIZE = "WORLD_SIZE"
LOCAL_RANK = "LOCAL_RANK"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
NODE_RANK = "GROUP_RANK"
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
THREADS = "OMP_NUM_THREADS"

VARIABLES = (
    Variable(BACKEND, "Name of the backend: which kind of device to work on."),
    Variable(STRATEGY, "Name of the strategy: how the model is laid out over processes."),
    Variable(PRECISION, "Name of the precision: `no`, `fp16`, `bf16`, or one that a plugin brings."),
    Variable(COLLECTIVES, "Name of the collectives: how processes exchange tensors."),
    Variable(LAUNCHER, "Name of the launcher that `torchport launch` uses."),
    Variable(TRACKERS, "Names of trackers, separated by commas; `all`: every one that works here."),
    Variable(TRACKERS_STRICT, "`1`: a tracker that fails ends the training, instead of being reported once."),
    Variable(QUANTIZER, "Name of the quantizer."),
    Variable(PLUGINS, "Allow-list of plugins, separated by commas; set but empty: the core's own only."),
    Variable(DISABLE_PLUGINS, "Deny-list of plugins, separated by commas; they are not imported."),
    Variable(ACCUMULATION_STEPS, "Micro-batches per optimizer step, where the script does not say."),
    Variable(
        CONFIG_FILE, "YAML file that `torchport launch` and `torchport plan` read, unless one is given."
    ),
    Variable(DEBUG, "`1`: check shapes and dtypes across processes before every collective operation."),
    Variable(TIMEOUT, "Seconds that a collective operation waits for other processes (default 1800)."),
    Variable(LOG_LEVEL, "Lowest level that loggers of `get_logger` log, such as `INFO`."),
    Variable(BIND_CPU, "`1`: bind each process to its own share of the processor cores."),
    Variable(
        RESUME, "What `Accelerator.resume` loads, where the script does not say: `auto`, or a checkpoint."
    ),
    Variable(ORIGINS, "Set by `torchport launch`: which flag or file each variable came from."),
    Variable(RANK, "Index of the process among all; set by the launcher."),
    Variable(WORLD_SIZE, "Number of processes; set by the launcher."),
    Variable(LOCAL_RANK, "Index of the process on its machine; set by the launcher."),
    Variable(LOCAL_WORLD_SIZE, "Number of processes on this machine; set by the launcher."),
    Variable(NODE_RANK, "Index of the machine; set by the launcher."),
    Variable(MASTER_ADDR, "Address of the machine of rank 0; set by the launcher."),
    Variable(MASTER_PORT, "TCP port there; set by the launcher."),
    Variable(THREADS, "Processor threads of each process; set by `torchport launch` unless set already."),
)

_OWN = frozenset(value for key, value in vars().items() if key.isupper() and isinstance(value, str))


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether the variable is set to something that means yes."""
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def is_own(name: str) -> bool:
    """Whether the core itself reads the variable; all others are of plugins' settings."""
    return name in _OWN or name.startswith(PARALLELISM)


def names(environ: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    """Split a comma-separated variable; `None` if it is not set at all."""
    value = environ.get(name)
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def origins(environ: Mapping[str, str]) -> dict[str, str]:
    """Return where the launcher took each variable from, by variable name."""
    pairs = (pair.partition("=") for pair in environ.get(ORIGINS, "").split(";") if "=" in pair)
    return {variable: origin for variable, _, origin in pairs}


def format_origins(values: Mapping[str, str]) -> str:
    """Write what `origins` reads."""
    return ";".join(f"{variable}={origin.replace(';', ',')}" for variable, origin in sorted(values.items()))
