"""Run the matrix of strategies, precisions, accumulation and processes, and print it as a table.

python tests/matrix/run.py                                   # everything; writes docs/matrix.md
python tests/matrix/run.py --processes 2 --layout ddp        # some of it; prints it only

All cells of one number of processes run one after another in one job. A cell that takes longer than its limit, or ends
the job, fails with the stacks of all processes; the job starts again with the next cell.
The exit status is 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cells import ACCUMULATIONS, LAYOUTS, PRECISIONS, PROCESSES, TOLERANCE, Cell, Verdict, cells, judge

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 900
"""Seconds for a job; each cell has its own limit inside it."""


TORCHPORT = (sys.executable, "-m", "torchport")


def run(wanted: list[Cell], limit: float = 60, torchport: tuple[str, ...] = TORCHPORT) -> dict[Cell, Verdict]:
    """Run cells of one number of processes, and return what has become of each.

    Args:
        wanted: The cells, in the order in which they are run.
        limit: Seconds for each cell.
        torchport: The command line, up to its sub-command.
    """
    verdicts: dict[Cell, Verdict] = {}
    while rest := wanted[len(verdicts) :]:
        with tempfile.TemporaryDirectory() as folder:
            told = json.dumps([dataclasses.asdict(cell) for cell in rest])
            output = launch(
                rest[0].processes, str(WORKER), folder, told, torchport=torchport, MATRIX_LIMIT=str(limit)
            ).stdout
            ranks = [_results(path) for path in sorted(Path(folder).glob("rank*.jsonl"))]
        for cell in rest:
            if len(ranks) < cell.processes or any(cell.name not in rank for rank in ranks):
                verdicts[cell] = Verdict("fails", f"the job ended or hung; its output:\n{output[-6000:]}")
                break
            verdicts[cell] = judge(cell, [rank[cell.name] for rank in ranks])
    return verdicts


def launch(
    processes: int, *command: str, torchport: tuple[str, ...] = TORCHPORT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Launch a script and its arguments; its standard error is in its output."""
    launcher = [*torchport, "launch", "--num-processes", str(processes)]
    try:
        return subprocess.run(
            [*launcher, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 124, f"over {LIMIT} seconds\n{error.output!r}")


def _results(path: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["cell"]: line for line in lines if "cell" in line}


# --- tables ------------------------------------------------------------------------------------------------------


def table(processes: int, verdicts: dict[Cell, Verdict], notes: list[str]) -> list[list[str]]:
    """Return the rows of a table, headings first; reasons of refusals are appended to `notes`."""
    layouts = dict.fromkeys(cell.layout for cell in verdicts if cell.processes == processes)
    columns = [(precision, steps) for precision in PRECISIONS for steps in ACCUMULATIONS]
    rows = [["", *(f"{precision}, {steps}" for precision, steps in columns)]]
    for layout in layouts:
        found = (verdicts[Cell(layout, precision, steps, processes)] for precision, steps in columns)
        rows.append([layout, *(_text(verdict, notes) for verdict in found)])
    return rows


def _text(verdict: Verdict, notes: list[str]) -> str:
    if verdict.outcome == "runs":
        return f"{verdict.deviation:.0e}"
    if verdict.outcome == "fails":
        return "FAILS"
    reason = re.sub(r"\d+ processes", "several processes", " ".join(verdict.text.split()))
    if reason not in notes:
        notes.append(reason)
    return f"refused ({notes.index(reason) + 1})"


def page(verdicts: dict[Cell, Verdict]) -> str:
    """Return the page `docs/matrix.md`."""
    lines = [
        "# What works with what",
        "",
        "Every strategy with every precision, with and without accumulation of gradients, on 1, 2 and 4 processes, as",
        "`make matrix` ran it on processors. A small GPT is trained for some steps; a number is how far any loss was",
        "from the loss of plain PyTorch in float32 in one process, on the same batches. What is refused is refused",
        "before anything is trained. Each cell also checks that it is what it says: the plan, the class of the model",
        "and of its layers, the dtype of results, and which part of parameters and optimizer states a process holds.",
        "",
        "| precision | largest deviation allowed |",
        "| --- | --- |",
        *(f"| {precision} | {TOLERANCE[precision]:.1e} |" for precision in PRECISIONS),
        "",
        "These follow from the arithmetic: 4 times the rounding error of the dtype, and 1e-6 for the places where engines add",
        "a small number to the norm that they clip to; with fp8 (E4M3, emulated), the error of two products of 8-bit",
        "numbers on top of that of bf16. Columns: precision, micro-batches for each step.",
    ]
    notes: list[str] = []
    for processes in dict.fromkeys(cell.processes for cell in verdicts):
        heading, *rows = table(processes, verdicts, notes)
        lines += ["", f"## {processes} process{'es' * (processes > 1)}", ""]
        lines += [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "## Refusals", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, action="append", choices=PROCESSES, help="how many; repeat it"
    )
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="a row; repeat it")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a cell (default: 60)")
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    console, verdicts, notes = Console(), {}, []
    for processes in args.processes or PROCESSES:
        with console.status(f"{processes} processes …"):
            verdicts |= run(cells(processes, args.layout or LAYOUTS), args.limit)
        heading, *rows = table(processes, verdicts, notes)
        shown = Table(*heading, title=f"{processes} processes: precision, micro-batches for each step")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for number, reason in enumerate(notes, 1):
        console.print(f"({number}) {reason}", markup=False)
    failed = {cell: verdict for cell, verdict in verdicts.items() if verdict.outcome == "fails"}
    for cell, verdict in failed.items():
        console.print(f"FAILS: {cell.name}: {verdict.text}", markup=False, style="red")
    console.print(f"{len(verdicts)} cells, {len(failed)} fail")
    if not args.processes and not args.layout and not failed:
        (ROOT / "docs" / "matrix.md").write_text(page(verdicts))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
