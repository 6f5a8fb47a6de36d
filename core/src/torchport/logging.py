"""Loggers that know the rank: one line for the job instead of one for each process."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from torchport import envvars
from torchport.aliases import translate_environment
from torchport.errors import ConfigurationError, TorchportError
from torchport.ops import exchange
from torchport.rank import current_topology
from torchport.runtime import Runtime

if TYPE_CHECKING:
    _LoggerAdapter = logging.LoggerAdapter[logging.Logger]
    _StreamHandler = logging.StreamHandler[Any]
else:  # not generic at run time before Python 3.11
    _LoggerAdapter, _StreamHandler = logging.LoggerAdapter, logging.StreamHandler

# What `stacklevel` skips: until Python 3.10 also the frames of `logging` itself.
_OWN_FRAMES = 2 if sys.version_info >= (3, 11) else 4


class MultiProcessAdapter(_LoggerAdapter):
    """A logger whose methods take two arguments more; `get_logger` returns it.

    Methods such as `info(message, *args, main_process_only=True, in_order=False)` log on the main process only,
    unless told otherwise. Before a run is opened, the variables set by the launcher say which process that is.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})
        self._warned: set[str] = set()

    def log(  # type: ignore[override]
        self,
        level: int,
        msg: Any,
        *args: Any,
        main_process_only: bool = True,
        in_order: bool = False,
        **kwargs: Any,
    ) -> None:
        """Log a message.

        Args:
            level: Number of the level.
            msg: The message, as for `logging.Logger.log`.
            *args: What is formatted into it.
            main_process_only: Whether only the main process logs.
            in_order: Whether, if all log, they do so one after the other by rank. Then call it on every process.
            **kwargs: As for `logging.Logger.log`.

        Raises:
            TorchportError: if the processes are to log in order, and have not met yet.
        """
        if not self.isEnabledFor(level):
            return
        topology = current_topology()
        msg, options = self.process(msg, kwargs)
        options["stacklevel"] = options.get("stacklevel", 1) + _OWN_FRAMES - 1
        if main_process_only or not in_order or topology.world_size == 1:
            if topology.rank == 0 or not main_process_only:
                self.logger.log(level, msg, *args, **options)
            return
        if Runtime.current is None:
            raise TorchportError(
                f"logger {self.logger.name!r} is to log in order of rank",
                reason="the processes cannot wait for each other before they have met",
                hint="make an Accelerator() or PartialState() first, or leave in_order out",
            )
        for rank in range(topology.world_size):
            if rank == topology.rank:
                self.logger.log(level, msg, *args, **options)
            exchange.wait_for_everyone()

    def warning_once(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a warning, and nothing when it is called again with the same message and arguments."""
        key = repr((msg, args))
        if key not in self._warned:
            self._warned.add(key)
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            self.log(logging.WARNING, msg, *args, **kwargs)


class _Fallback(_StreamHandler):
    """Shows the records of a logger whose level was asked for, where the script has not set up logging itself."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.owner = logger
        self.setFormatter(logging.Formatter(logging.BASIC_FORMAT))

    def filter(self, record: logging.LogRecord) -> Any:
        """Let a record pass if no other handler will see it."""
        logger: logging.Logger | None = self.owner
        while logger is not None:
            if any(not isinstance(handler, _Fallback) for handler in logger.handlers):
                return False
            logger = logger.parent if logger.propagate else None
        return super().filter(record)


def get_logger(name: str, log_level: str | int | None = None) -> MultiProcessAdapter:
    """Return a logger that logs on the main process only, unless told otherwise.

    Where logging has not been set up (`logging.basicConfig`), the messages of a logger whose level was asked for
    go to standard error.

    Args:
        name: Name of the logger, as for `logging.getLogger`.
        log_level: The lowest level to log: `"DEBUG"`, `"INFO"`, `"WARNING"`, `"ERROR"` or `"CRITICAL"`, in any case.
            By default `TORCHPORT_LOG_LEVEL`; if that is not set either, Python's own rules hold.

    Raises:
        ConfigurationError: if there is no such level.
    """
    logger = logging.getLogger(name)
    level, source = log_level, f"get_logger(log_level={log_level!r})"
    if level is None:
        level = translate_environment(os.environ).get(envvars.LOG_LEVEL) or None
        source = f"{envvars.LOG_LEVEL}={level}"
    if level is not None:
        try:
            logger.setLevel(level.strip().upper() if isinstance(level, str) else level)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{source} is not a level", hint="DEBUG, INFO, WARNING, ERROR or CRITICAL"
            ) from error
        if not any(isinstance(handler, _Fallback) for handler in logger.handlers):
            logger.addHandler(_Fallback(logger))
    return MultiProcessAdapter(logger)
