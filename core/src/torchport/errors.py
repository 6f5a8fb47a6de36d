"""Every error that Torchport raises on purpose.

Each message answers four questions, in this order: what was wanted (and by whom), what was found, why that
will not do, and what to type next.
"""

from __future__ import annotations


class TorchportError(Exception):
    """Base class of all errors raised by Torchport.

    Args:
        problem: What was wanted and could not be had, in one sentence.
        found: What is there instead.
        reason: Why that will not do.
        hint: What to type or change next.
    """

    def __init__(self, problem: str, *, found: str = "", reason: str = "", hint: str = "") -> None:
        self.problem, self.found, self.reason, self.hint = problem, found, reason, hint
        parts = [problem]
        parts += [f"  found:  {found}"] if found else []
        parts += [f"  reason: {reason}"] if reason else []
        parts += [f"  try:    {hint}"] if hint else []
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.found, self.reason, self.hint))


def _rebuild(kind: type[TorchportError], problem: str, found: str, reason: str, hint: str) -> TorchportError:
    """Restore a pickled error: exceptions pickle positional arguments only."""
    return kind(problem, found=found, reason=reason, hint=hint)


class ConfigurationError(TorchportError, ValueError):
    """A configuration file, flag, variable or argument has an unknown name or a value that is not allowed."""


class PluginError(TorchportError):
    """A plugin is broken, or breaks the rules of the seam."""


class InvalidSpecError(PluginError, ValueError):
    """A descriptor returned by a plugin's hook is not valid."""


class DuplicateNameError(PluginError):
    """Two distributions provide a plugin of the same kind under the same name."""


class SelectionError(TorchportError):
    """A slot of the plan cannot be filled."""


class UnknownPluginError(SelectionError):
    """No installed plugin has the name that was asked for."""


class UnavailableError(SelectionError):
    """The plugin that was asked for is installed, but cannot work on this machine."""


class DeniedError(SelectionError):
    """The plugin that was asked for is switched off by an allow-list or deny-list."""


class AmbiguousError(SelectionError):
    """Several plugins are equally good and nothing says which one to take."""


class IncompatibleError(SelectionError):
    """Two choices of the plan do not work together."""


class PlanMismatchError(TorchportError):
    """The processes of one job have resolved different plans."""


class LaunchError(TorchportError):
    """Processes could not be started."""


class WorkerError(LaunchError, RuntimeError):
    """A function that was run in several processes failed in one of them; the message has its traceback."""


class BatchSizeError(TorchportError, RuntimeError):
    """No batch size fits into memory."""


class OperationError(TorchportError, RuntimeError):
    """A collective operation was called with arguments that do not fit together across processes."""


class DataLoadingError(TorchportError, RuntimeError):
    """The process that reads data for all could not; the message has its traceback."""


class UnsupportedOperationError(TorchportError, NotImplementedError):
    """The chosen plugin cannot do what was asked of it."""


class TrackerError(TorchportError, RuntimeError):
    """A tracker failed, in a run that was asked to stop where one does."""


class CheckpointError(TorchportError):
    """A checkpoint could not be written, or is incomplete, damaged or of another shape."""


DistributedOperationException = OperationError
"""The documented name of the error raised by the shape checks of debug mode."""
