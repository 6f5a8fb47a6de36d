"""Suites report each check as a test, what is not claimed by itself, and write scorecards; jobs that hang say where."""

from __future__ import annotations

import importlib.metadata
import re
import sys

import pytest
from torchport.errors import ConfigurationError
from torchport.testing import BackendConformance, Scorecard, jobs, plugin
from torchport.testing.checks import Subject, catalogue
from torchport.testing.scorecard import FAIL, NOT_CLAIMED, PASS, Result

catalogue(Subject(kind="backend", name="cpu"))  # the inner run cannot import extension modules anew

SUITE = """
import contextlib
from torchport.testing import BackendConformance

class TestCpu(BackendConformance):
    backend = "cpu"
    levels = ("L0", "L1", "L2")
    verified_on = "stub"

    @classmethod
    def stubs(cls):
        return contextlib.nullcontext()
"""


@pytest.fixture
def run(pytester):
    """Run pytest with the kit's plugin, which is an entry point where the core is installed."""
    points = importlib.metadata.entry_points(group="pytest11")
    plugins = [] if any(point.value == plugin.__name__ for point in points) else [plugin]

    def run_with(*arguments: str):
        pytester.makepyfile(test_cpu=SUITE)
        return pytester.inline_run("-p", "no:cacheprovider", *arguments, plugins=plugins)

    yield run_with
    sys.modules["torchport.testing.suites"].RAN.clear()


def test_each_check_is_a_test_and_what_is_not_claimed_is_counted_by_itself(run, pytester, capsys):
    wanted = "package.summary or device.count or random.per-device or streams.copy or barrier.waits"
    result = run("-k", wanted, "--scorecards", "cards", "-v")
    assert result.ret == 0
    said = capsys.readouterr().out
    assert "test_cpu.py::TestCpu::test_conformance[L1-device.count] PASSED" in said
    assert "[L1-streams.copy] NOT CLAIMED (capabilities() does not declare streams)" in said
    assert re.search(r"2 passed, \d+ deselected, 3 not claimed", said)
    card = Scorecard.read(pytester.path / "cards" / "backend-cpu.json")
    assert {r.id: r.outcome for r in card.results} == {
        "package.summary": PASS,
        "device.count": PASS,
        "random.per-device": NOT_CLAIMED,
        "streams.copy": NOT_CLAIMED,
        "barrier.waits": NOT_CLAIMED,
    }
    assert card.verified_on == "stub"
    assert card.levels == {"L0": PASS, "L1": PASS, "L2": NOT_CLAIMED}
    assert {"python", "torch", "torchport-core", "torchport-cpu"} <= card.versions.keys()


def test_a_check_that_fails_is_a_test_that_fails(run, capsys, monkeypatch):
    from torchport_cpu.backend import CpuBackend

    monkeypatch.setattr(CpuBackend, "count", lambda self: 3)
    assert run("-k", "device.count").ret == 1
    assert "count() returned 3, the probe found 1" in capsys.readouterr().out


def test_a_suite_that_names_nothing_is_told_what_to_name():
    class Nameless(BackendConformance):
        pass

    with pytest.raises(pytest.UsageError, match="must name what it tests: backend = "):
        Nameless.subject()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ("L2",)}, "there is no level 'L2' for a tracker"),
        ({"verified_on": "paper"}, "verified_on is 'paper'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Subject(kind="tracker", name="jsonl", **settings)


def test_a_scorecard_is_read_as_it_was_written(tmp_path):
    results = (Result("a", "L0", "one", PASS), Result("b", "L1", "two", FAIL, "it is wrong"))
    card = Scorecard(kind="tracker", name="x", versions={"torch": "2"}, results=results)
    card.write(tmp_path / "deep" / "tracker-x.json")
    assert Scorecard.read(tmp_path / "deep" / "tracker-x.json") == card
    assert not card.passed
    assert card.in_words().splitlines() == [
        "L0 package      pass         1 passed",
        "L1 object       fail         1 failed",
    ]
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(ConfigurationError, match="is not a scorecard"):
        Scorecard.read(tmp_path / "other.json")


HANGING = """
import subprocess, sys, time

def waits_for_ever():
    print("waiting", flush=True)
    time.sleep(1000)

if len(sys.argv) == 1:
    ranks = [subprocess.Popen([sys.executable, __file__, rank]) for rank in "01"]
    for rank in ranks:
        rank.wait()
else:
    waits_for_ever()
"""


def test_a_job_that_hangs_fails_with_the_stacks_of_all_its_processes(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    ended = jobs.run_job([sys.executable, str(script)], limit=3)
    assert ended.hung
    assert ended.output.count("waiting") == 2
    assert ended.output.count("in waits_for_ever") == 2
    assert "nothing happened for 3 seconds; where each process was" in ended.in_words(3)


def test_a_job_that_goes_on_does_not_hang():
    ticks = iter(range(1000))
    code = "import time; time.sleep(2)"
    ended = jobs.run_job([sys.executable, "-c", code], limit=1, progress=lambda: next(ticks))
    assert (ended.returncode, ended.hung) == (0, False)


def test_a_job_has_no_place_in_another_job(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHPORT_BACKEND", "acme")
    environ = jobs.job_environment({"MORE": "1"})
    assert "RANK" not in environ
    assert "TORCHPORT_BACKEND" not in environ
    assert environ["MORE"] == "1"
