"""Every behaviour of `workers/names.py`, over gloo."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess
SOURCE = Path(__file__).parent / "workers" / "names.py"
CHECKS = [
    node.name
    for node in ast.parse(SOURCE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def outcomes(run_worker, launch):
    return run_worker(launch(2), SOURCE.name)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    assert [rank.get(check, "not reached") for rank in outcomes] == ["passed", "passed"]
