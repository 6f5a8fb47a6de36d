"""Run several examples one after the other in the same processes, which import PyTorch once.

Usage: examples.py FOLDER COMMANDS, with COMMANDS in JSON: a list of [label, script, argument, …]. What a script prints
on rank R goes to FOLDER/LABEL.R.txt, with `exit status N` as the last line. Scripts run in FOLDER/work.
"""

import contextlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def run(script, arguments):
    """Run an example as Python would, and return its exit status."""
    sys.argv = [str(EXAMPLES / script), *arguments]
    sys.path[0] = str(EXAMPLES)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    folder, commands = Path(sys.argv[1]).absolute(), json.loads(sys.argv[2])
    (folder / "work").mkdir(exist_ok=True)
    os.chdir(folder / "work")
    for label, script, *arguments in commands:
        with (folder / f"{label}.{os.environ.get('RANK', '0')}.txt").open("w", buffering=1) as output:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                status = run(script, arguments)
            print(f"exit status {status}", file=output)
        if status == 1:  # the other processes may be waiting for this one
            os._exit(1)


main()
