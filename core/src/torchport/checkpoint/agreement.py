"""Steps that succeed on every process, or fail on every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchport.errors import CheckpointError
from torchport.ops import exchange


def by_collectives(value: Any) -> list[Any]:
    """Return the values of all processes, in order of rank, over the process group: for the main thread."""
    return exchange.gather_object([value])


class Agreement:
    """The processes of a job doing one thing together: the first step that fails anywhere ends it everywhere.

    A process that fails says so where the others wait for it next, so that none is left waiting. One step may
    contain others.

    Args:
        failed: What to report when a step fails that says what it was doing.
        reason: Returns what else to say then.
        gather: Returns the values of all processes, in order of rank.
    """

    def __init__(
        self,
        failed: str,
        reason: Callable[[], str] = str,
        gather: Callable[[Any], list[Any]] = by_collectives,
    ) -> None:
        self.failed = failed
        self._why = reason
        self.gather = gather
        self._over = False

    def step(self, action: Callable[[], Any], doing: str = "") -> list[Any]:
        """Run `action` on every process, and return what each of them returned, in order of rank.

        Args:
            action: What to do; its result must be picklable.
            doing: What it does, in the words of an error; left out, the action's own error is raised.

        Raises:
            CheckpointError: on every process, if `action` raised on any of them.
        """
        error: Exception | None = None
        value = None
        try:
            value = action()
        except Exception as problem:
            if self._over:  # of a step inside this one: all processes know already
                raise
            error = problem
        outcomes = self.gather((self._told(error, doing), value))
        problems = {rank: problem for rank, (problem, _) in enumerate(outcomes) if problem is not None}
        if problems:
            self._over = True
            raise self._merged(problems, doing) from error
        return [value for _, value in outcomes]

    def _merged(self, problems: dict[int, CheckpointError], doing: str) -> CheckpointError:
        """Return one error for the problems of all ranks."""
        errors = list({str(error): error for error in problems.values()}.values())
        first = errors[0]
        if doing:
            found = "; ".join(
                f"rank {rank} could not {doing}: " + ": ".join(filter(None, (error.problem, error.found)))
                for rank, error in problems.items()
            )
            return CheckpointError(
                self.failed, found=found, reason=first.reason or self._why(), hint=first.hint
            )
        same = [error.found for error in errors if error.problem == first.problem and error.found]
        return CheckpointError(
            first.problem, found="; ".join(dict.fromkeys(same)), reason=first.reason, hint=first.hint
        )

    def _told(self, error: Exception | None, doing: str) -> CheckpointError | None:
        """Return an error as all processes will be told of it."""
        if error is None or type(error) is CheckpointError:
            return error
        text = f"{type(error).__name__}: {error}"
        return (
            CheckpointError(text) if doing else CheckpointError(self.failed, found=text, reason=self._why())
        )
