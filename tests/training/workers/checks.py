"""Run the checks of a worker, and write down the outcome of each."""

import json
import sys
import traceback
from pathlib import Path

from torchport import PartialState


def run_checks(names: dict[str, object]) -> None:
    """Call every `check_...` of a script, in order, with the folder that it was given; stop at the first failure."""
    folder = Path(sys.argv[1])
    outcomes = {}
    for name, check in names.items():
        if not name.startswith("check_"):
            continue
        try:
            check(folder)
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the processes may be out of step now
    state = PartialState()
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(outcomes))
    state.destroy_process_group()
