"""Run the checks of a worker, and write down the outcome of each."""

import json
import sys
import traceback
from pathlib import Path

from torchport import PartialState
from torchport.state import AcceleratorState


def run_checks(names: dict[str, object]) -> None:
    """Call every `check_...` of a script, in order, each in a run of its own; stop where processes may be out of step."""
    folder, outcomes = Path(sys.argv[1]), {}
    for name, check in names.items():
        if name.startswith("check_"):
            AcceleratorState._reset_state()
            try:
                check(folder)
                outcomes[name] = "passed"
            except Exception:
                outcomes[name] = traceback.format_exc()
                if PartialState().num_processes > 1:
                    break
    state = PartialState()
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(outcomes))
    state.destroy_process_group()
