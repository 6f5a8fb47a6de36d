"""One process of a job of the conformance kit: does its parts of the checks and writes down how each went.

python -m torchport.testing.worker JOB.json
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchport.aliases import translate_environment
from torchport.errors import TorchportError
from torchport.plan.discovery import discover
from torchport.plan.topology import detect_topology
from torchport.testing.checks import Bench, Check, NotClaimed, Place, Subject, catalogue
from torchport.testing.scorecard import FAIL, NOT_CLAIMED, PASS

_FRAMES = 3


class Diary:
    """What a rank writes down, one JSON object a line, so that whoever started the job can read it at any time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.task, self.check = 0, ""

    def write(self, event: str, **values: Any) -> None:
        """Append a line about the check at hand."""
        self._file.write(
            json.dumps({"task": self.task, "check": self.check, "event": event, **values}) + "\n"
        )


def outcome_of(part: Any, bench: Any) -> tuple[str, str]:
    """Do a part of a check; return its outcome and the reason."""
    try:
        part(bench)
    except NotClaimed as reason:
        return NOT_CLAIMED, str(reason)
    except Exception as error:
        return FAIL, in_words(error)
    return PASS, ""


def in_words(error: BaseException) -> str:
    """Say what went wrong: the message of a failed check, or an unexpected error and where it was raised."""
    if isinstance(error, AssertionError):
        return str(error) or "an assertion failed"
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {error} [{where}]"


def do_task(subject: Subject, wanted: Sequence[str], place: Place, diary: Diary) -> None:
    """Do the parts of some checks that belong here."""
    chosen = [check for check in catalogue(subject) if check.id in wanted and place.phase in check.parts]
    for bench, group in itertools.groupby(chosen, key=lambda check: check.bench):
        _do_group(bench, list(group), subject, place, diary)


def _do_group(bench: Bench, group: list[Check], subject: Subject, place: Place, diary: Diary) -> None:
    diary.check = group[0].id
    diary.write("begin")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(bench(subject, place))
        except Exception as error:
            for check in group:
                diary.check = check.id
                diary.write("end", outcome=FAIL, reason=in_words(error))
            return
        for check in group:
            diary.check = check.id
            diary.write("begin")
            outcome, reason = outcome_of(check.parts[place.phase], opened)
            diary.write("end", outcome=outcome, reason=reason)
            after = getattr(opened, "after_check", None)
            if after is not None:
                after(outcome == FAIL)


def _tasks(job: dict[str, Any]) -> Iterator[tuple[Subject, list[str]]]:
    for task in job["tasks"]:
        yield Subject.from_json(task["subject"]), task["checks"]


def main(arguments: Sequence[str]) -> None:
    """Run the job that a file describes."""
    faulthandler.enable()
    job = json.loads(Path(arguments[0]).read_text())
    topology = detect_topology(translate_environment(os.environ), discover(os.environ))
    folder = Path(job["folder"])
    diary = Diary(folder / f"{job['name']}.rank{topology.rank}.jsonl")
    if topology.world_size != job["processes"]:
        raise TorchportError(
            f"the job has {topology.world_size} processes instead of {job['processes']}",
            found=topology.source,
        )
    for number, (subject, wanted) in enumerate(_tasks(job)):
        diary.task = number
        shared = folder / f"task{number}"
        shared.mkdir(exist_ok=True)
        place = Place(job["phase"], shared, topology.rank, topology.world_size, diary.write)
        do_task(subject, wanted, place, diary)


if __name__ == "__main__":
    main(sys.argv[1:])
