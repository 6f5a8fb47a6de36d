"""Loggers and progress bars for the job instead of one for each process."""

import io
import logging
import os
import subprocess
import sys

import pytest
from torchport import rank
from torchport.errors import ConfigurationError
from torchport.logging import get_logger
from torchport.plugin import Topology
from torchport.utils import tqdm


@pytest.fixture
def as_rank(monkeypatch):
    """Be another process than the main one."""

    def become(index: int) -> None:
        monkeypatch.setattr(rank, "_detected", lambda *_: Topology(rank=index, world_size=4))

    return become


@pytest.fixture
def fresh_logger(request):
    """A logger of this test's own, left as if it had never been."""
    name = request.node.name
    yield name
    logging.getLogger(name).handlers.clear()
    logging.Logger.manager.loggerDict.pop(name, None)


@pytest.mark.multiprocess
def test_the_main_process_logs_or_all_do_in_order_of_rank(run_worker, launch):
    ranks = run_worker(launch(2), "logs.py")
    in_order = [f"INFO rank {r}, line {line}" for line in (1, 2, 3) for r in (0, 1)]
    for found in ranks:
        assert found["log"] == [
            "INFO early, main process",
            "INFO main process",
            *in_order,
            "WARNING once, main process",
        ]
        assert "the processes cannot wait for each other before they have met" in found["in order"]
    assert [found["bar"] for found in ranks] == [[True, True], [False, True]]


def test_other_processes_log_only_when_asked_to(as_rank, fresh_logger, caplog):
    as_rank(2)
    logger = get_logger(fresh_logger, log_level="info")
    logger.info("not this")
    logger.info("but %s", "this", main_process_only=False)
    assert caplog.messages == ["but this"]


def test_records_name_the_line_of_the_caller(fresh_logger, caplog):
    logger = get_logger(fresh_logger, log_level="DEBUG")
    logger.debug("one")
    logger.log(logging.ERROR, "two")
    logger.warning_once("three")
    assert {(record.filename, record.funcName) for record in caplog.records} == {
        ("test_extras_logging.py", "test_records_name_the_line_of_the_caller")
    }
    assert len({record.lineno for record in caplog.records}) == 3


def test_a_warning_is_given_once_for_each_message_and_arguments(fresh_logger, caplog):
    logger = get_logger(fresh_logger)
    for value in (1, 1, [2], [2], 1):
        logger.warning_once("value %s", value)
    assert caplog.messages == ["value 1", "value [2]"]


@pytest.mark.parametrize("variable", ["TORCHPORT_LOG_LEVEL", "ACCELERATE_LOG_LEVEL"])
def test_the_level_is_the_argument_or_else_the_variable(variable, fresh_logger, monkeypatch):
    assert get_logger(fresh_logger).logger.level == logging.NOTSET
    monkeypatch.setenv(variable, "error")
    assert get_logger(fresh_logger).getEffectiveLevel() == logging.ERROR
    assert get_logger(fresh_logger, log_level=logging.DEBUG).getEffectiveLevel() == logging.DEBUG
    monkeypatch.setenv(variable, "loud")
    with pytest.raises(ConfigurationError, match="TORCHPORT_LOG_LEVEL=loud is not a level"):
        get_logger(fresh_logger)
    with pytest.raises(ConfigurationError, match=r"get_logger\(log_level='quiet'\) is not a level"):
        get_logger(fresh_logger, log_level="quiet")


SCRIPT = """
import logging, sys
from torchport.logging import get_logger
logger = get_logger("mine", log_level="DEBUG")
logger.debug("shown without any set-up")
logging.basicConfig(format="set up: %(message)s")
logger.debug("shown once")
"""


def test_a_level_that_was_asked_for_shows_also_where_logging_is_not_set_up():
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr.splitlines() == ["DEBUG:mine:shown without any set-up", "set up: shown once"]


def test_the_bar_of_the_main_process_shows_and_that_of_others_only_iterates(as_rank):
    for index, shown in ((0, True), (1, False)):
        as_rank(index)
        screen = io.StringIO()
        assert list(tqdm(range(3), desc="epoch", file=screen)) == [0, 1, 2]
        assert ("epoch" in screen.getvalue()) is shown
        assert tqdm(range(3), disable=True, file=screen).disable
        assert not tqdm(range(3), main_process_only=False, file=screen).disable
