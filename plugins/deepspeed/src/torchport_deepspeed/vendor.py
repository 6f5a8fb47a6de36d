"""DeepSpeed itself: imported quietly, on the run's device, over the run's process group."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torchport.errors import IncompatibleError
from torchport.plugin import Topology
from torchport.runtime import Runtime

LOG_LEVEL = "TORCHPORT_DEEPSPEED_LOG_LEVEL"
"""Variable with the lowest level that DeepSpeed logs (`INFO`, `WARNING`, …); set, nothing of it is held back."""

_DEVICES = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa")
_opened: list[Any] = []  # the process group that DeepSpeed works over


def load(device: torch.device, topology: Topology) -> Any:
    """Import DeepSpeed for a device, let it use the open process group, and return the module.

    Raises:
        IncompatibleError: if DeepSpeed has no accelerator for the device, or works on another one already.
    """
    wanted = os.environ.get("DS_ACCELERATOR")
    if device.type not in _DEVICES:
        raise IncompatibleError(
            f"strategy 'deepspeed' on a device of type {device.type!r}",
            reason=f"DeepSpeed works on {', '.join(_DEVICES)}",
            hint="another strategy",
        )
    if wanted not in (None, device.type):
        raise IncompatibleError(
            f"DS_ACCELERATOR={wanted}, and this run works on {device.type!r}",
            hint="unset DS_ACCELERATOR, or choose the backend of that device",
        )
    os.environ["DS_ACCELERATOR"] = device.type  # it would look for devices by itself, and warn
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))
    with quietly():
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        found = get_accelerator().device_name()
        if found != device.type:
            raise IncompatibleError(
                f"DeepSpeed works on {found!r}, and this run on {device.type!r}",
                reason="it was imported before the run began, and chose by itself",
                hint=f"export DS_ACCELERATOR={device.type}, or make the Accelerator before importing deepspeed",
            )
        if _opened != [dist.group.WORLD]:
            _open()
            _opened[:] = [dist.group.WORLD]
    if not talks():
        warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    level = os.environ.get(LOG_LEVEL)
    if level:
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string(level.lower())
    return deepspeed


def _open() -> None:
    """Let DeepSpeed communicate over the open group; forget groups of a run that has ended."""
    from deepspeed.utils import groups

    comm: Any = importlib.import_module("deepspeed.comm.comm")
    if comm.cdb is not None and not _opened:
        return  # the script has opened it over this group
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # an attribute of that name is PyTorch
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and name.isupper():
            if isinstance(value, (dict, list)):
                value.clear()
            elif isinstance(value, dist.ProcessGroup):
                setattr(groups, name, None)
    groups.mesh_device = None
    comm.cdb = None
    # On processors, DeepSpeed would compile shared-memory collectives of its own at every start without them, and
    # wait forever where a compilation was interrupted. The plan's collectives carry everything instead.
    build, backend.build_shm_op = backend.build_shm_op, lambda: None
    try:
        comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    finally:
        backend.build_shm_op = build


def talks() -> bool:
    """Whether the user asked for what DeepSpeed has to say."""
    debug = Runtime.current is not None and Runtime.current.debug
    return debug or bool(os.environ.get(LOG_LEVEL))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back what DeepSpeed prints and logs below errors, unless the user asked for it."""
    if talks():
        yield
        return
    log = logging.getLogger("DeepSpeed")
    held, before = io.StringIO(), log.level
    log.addFilter(_errors_only)
    try:
        with contextlib.redirect_stdout(held), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except Exception:
        sys.stderr.write(held.getvalue())  # it may say why
        raise
    finally:
        log.removeFilter(_errors_only)
        log.setLevel(before or logging.WARNING)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def can_build(op: str) -> str:
    """Say why one of DeepSpeed's compiled operations cannot be had here; empty if it can.

    Args:
        op: Name of its builder in `deepspeed.ops.op_builder`, such as `"AsyncIOBuilder"`.
    """
    from deepspeed.accelerator import get_accelerator

    with quietly():
        builder = get_accelerator().create_op_builder(op)
        if builder is None:
            return f"DeepSpeed has no {op.removesuffix('Builder')} for this device"
        if builder.is_compatible(verbose=False):
            return ""
    return str(builder.error_log or "its libraries or a compiler are missing (ds_report says which)")
