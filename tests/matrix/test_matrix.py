"""Every strategy with every precision, accumulation and number of processes: it runs as what it is, or is refused.

Here run the cells with accumulation in two processes, and in four what is different there; `make test-all` runs all
in two processes, and `make matrix` all there are.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cells import TOLERANCE, WINDOWS, Cell, cells, judge
from run import WORKER, run

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.plugins,
    pytest.mark.timeout(900),
]  # cells have their own limit
TWO = cells(2)
SHORT = [cell for cell in TWO if cell.accumulation > 1]
FOUR = [
    *(Cell("fsdp2 hybrid", precision, 3, 4) for precision in ("no", "bf16", "fp16")),
    *(
        Cell(f"fsdp2 x {dimension}", precision, 3, 4)
        for dimension, precision in (("tp", "bf16"), ("cp", "no"), ("sp", "no"))
    ),
]


REST = [cell for cell in TWO if cell not in SHORT]


@pytest.fixture(scope="module")
def verdict_on(prefork):
    """Run all cells of a kind when the first of them is asked for."""
    verdicts = {}

    def verdict(cell):
        if cell not in verdicts:
            kind = next(kind for kind in (SHORT, REST, FOUR) if cell in kind)
            verdicts.update(run(kind, torchport=(str(prefork / "torchport"),)))
        return verdicts[cell]

    return verdict


@pytest.mark.parametrize(
    "cell",
    [*SHORT, *FOUR, *(pytest.param(cell, marks=pytest.mark.long) for cell in REST)],
    ids=lambda cell: cell.name,
)
def test_a_cell_trains_as_plain_pytorch_does_or_is_refused_before_it_starts(verdict_on, cell):
    verdict = verdict_on(cell)
    assert verdict.outcome == ("refused" if cell.refusal else "runs") or (
        cell.may_be_refused and verdict.outcome == "refused"
    ), verdict.text
    if verdict.outcome == "refused":
        assert "try:" in verdict.text


def test_a_cell_that_hangs_ends_with_the_stacks_of_where_it_was(tmp_path, prefork):
    done = subprocess.run(
        [str(prefork / "python"), str(WORKER), str(tmp_path), json.dumps([dataclasses.asdict(Cell("single", "no", 1, 1))])],
        env={**os.environ, "MATRIX_LIMIT": "0.05"}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout (0:00:00" in done.stderr
    assert 'worker.py", line' in done.stderr


# --- how cells are judged ------------------------------------------------------------------------------------


def result(cell: Cell, off: float = 0.0, **seen) -> dict:
    losses = [3.0] * (WINDOWS + 1)
    return {
        "losses": [loss + off for loss in losses],
        "reference": losses,
        "seen": {**cell.must_be(), **seen},
    }


FULL = Cell("fsdp2 full", "bf16", 1, 2)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (result(FULL, 1.1 * TOLERANCE["bf16"]), "off, tolerance"),
        (result(FULL, float("nan")), "off, tolerance"),
        (result(FULL, 1e-3, held=1.0), "'held': (1.0, 0.5)"),
        (result(FULL, 1e-3, resharded=False), "'resharded': (False, True)"),
        (result(FULL, 1e-3, plan=["ddp", "bf16"]), "'plan'"),
        ({"refused": "no"}, "refused by 1 of 2"),
    ],
)
def test_what_is_off_or_something_else_fails(second, text):
    verdict = judge(FULL, [result(FULL, 1e-3), second])
    assert verdict.outcome == "fails"
    assert text in verdict.text


def test_what_was_computed_in_float32_is_no_bf16():
    assert judge(FULL, [result(FULL, 1e-7)] * 2).text.endswith("it was computed in float32")
    assert judge(FULL, [result(FULL, 1e-3)] * 2).outcome == "runs"


def test_what_must_be_refused_fails_when_it_runs_and_the_reverse():
    single = Cell("single", "no", 1, 2)
    assert "ran, and must be refused" in judge(single, [result(single)] * 2).text
    assert judge(FULL, [{"refused": "for a reason"}] * 2).outcome == "fails"
