"""Metrics reach the trackers of the plan and of the script, and one that fails does not stop the training."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torchport import Accelerator, ProjectConfiguration
from torchport.errors import ConfigurationError, InvalidSpecError, TrackerError, UnknownPluginError
from torchport.state import AcceleratorState
from torchport.tracking import GeneralTracker, LoggerType, register_tracker, unregister_tracker


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


class Memory(GeneralTracker):
    """Keeps what it is given."""

    name = "memory"

    def __init__(self, run_name="", **kwargs):
        self.calls = [("open", run_name, kwargs)]

    @property
    def tracker(self):
        return self.calls

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", values, step, kwargs))

    def finish(self):
        self.calls.append(("finish",))


class Broken(Memory):
    """Fails at whatever it is asked to fail at."""

    name = "broken"
    fails = ("log",)

    def __init__(self, run_name="", **kwargs):
        super().__init__(run_name, **kwargs)
        self.attempts = 0
        if "open" in self.fails:
            raise OSError("the service is down")

    def log(self, values, step=None, **kwargs):
        self.attempts += 1
        if "log" in self.fails:
            raise OSError("the disk is full")

    def finish(self):
        if "close" in self.fails:
            raise OSError("the line is cut")


@pytest.fixture
def registered():
    """Registers classes, and forgets them after the test."""
    made = []

    def register(kind):
        made.append(kind.name)
        return register_tracker(kind)

    yield register
    for name in made:
        unregister_tracker(name)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_lines_of_json_as_soon_as_they_are_logged(tmp_path):
    accelerator = Accelerator(log_with="jsonl", project_dir=tmp_path)
    accelerator.init_trackers("run", config={"lr": 0.1})
    accelerator.log({"loss": torch.tensor(0.5)}, step=3)
    first, second = lines(tmp_path / "run.jsonl")
    assert first["config"] == {"lr": 0.1}
    assert (second["step"], second["loss"]) == (3, 0.5)
    assert accelerator.get_tracker("jsonl", unwrap=True) == tmp_path / "run.jsonl"
    accelerator.end_training()
    assert accelerator.trackers == []


def test_the_logging_directory_comes_before_the_project_s(tmp_path):
    project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(log_with="jsonl", project_config=project)
    accelerator.init_trackers("run")
    accelerator.log({"loss": 1.0})
    accelerator.end_training()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_the_variable_chooses_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHPORT_TRACKERS", "jsonl")
    accelerator = Accelerator(project_dir=tmp_path)
    accelerator.init_trackers("run")
    assert [tracker.name for tracker in accelerator.trackers] == ["jsonl"]
    accelerator.end_training()


def test_the_script_s_own_tracker_gets_what_the_accelerator_is_given(tmp_path):
    tracker = Memory("mine")
    accelerator = Accelerator(log_with=[tracker, LoggerType.JSONL], project_dir=tmp_path)
    assert accelerator.plan["trackers"].choice == ("jsonl",)
    accelerator.init_trackers("run", config={"lr": 0.1})
    accelerator.log({"loss": 1.0}, step=2, log_kwargs={"memory": {"commit": True}})
    assert accelerator.get_tracker("memory") is tracker
    assert accelerator.get_tracker("memory", unwrap=True) is tracker.calls
    accelerator.end_training()
    assert tracker.calls == [
        ("open", "mine", {}),
        ("config", {"lr": 0.1}),
        ("log", {"loss": 1.0}, 2, {"commit": True}),
        ("finish",),
    ]
    assert lines(tmp_path / "run.jsonl")[1]["loss"] == 1.0


@pytest.mark.parametrize("how", ["class", "name", "variable", "all"])
def test_a_class_of_trackers_is_built_with_the_run_s_name_and_its_arguments(
    how, registered, tmp_path, monkeypatch
):
    if how != "class":
        registered(Memory)
    if how == "variable":
        monkeypatch.setenv("TORCHPORT_TRACKERS", "memory")
    asked = {"class": Memory, "name": "memory", "variable": None, "all": "all"}[how]
    accelerator = Accelerator(log_with=asked, project_dir=tmp_path)
    accelerator.init_trackers("run", init_kwargs={"memory": {"entity": "team"}})
    assert accelerator.get_tracker("memory").calls == [("open", "run", {"entity": "team"})]
    accelerator.end_training()


def test_a_class_that_requires_a_folder_gets_it(tmp_path):
    class Files(Memory):
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir):
            self.where = (run_name, logging_dir)

        def finish(self):
            pass

    accelerator = Accelerator(log_with=Files, project_dir=tmp_path)
    accelerator.init_trackers("run")
    assert accelerator.get_tracker("memory").where == ("run", str(tmp_path))
    accelerator.end_training()
    AcceleratorState._reset_state()
    with pytest.raises(ConfigurationError, match=r"'memory' writes files and needs a folder"):
        Accelerator(log_with=Files)


def test_all_takes_what_works_and_says_why_the_rest_does_not(tmp_path, registered):
    accelerator = Accelerator(log_with=["all"], project_dir=tmp_path)
    decision = accelerator.plan["trackers"]
    assert "jsonl" in decision.choice
    assert set(decision.implied) == set(decision.choice)
    assert all("is not installed: pip install" in rejection.reason for rejection in decision.rejected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (3, r"log_with=3 is neither the name of a tracker nor a tracker\n.*an object of the type int"),
        ([None, object], "is neither the name of a tracker nor a tracker"),
        (["jsonl", {"wandb": 1}], r"log_with=\{'wandb': 1\} is neither"),
        ({"wandb": {}}, r"log_with=\{'wandb': \{\}\} is neither"),
        (["jsonl", "jsonl"], "two trackers of one name"),
        (type("Nameless", (GeneralTracker,), {"log": lambda *_: None}), "it has no name, a text"),
        (type("Silent", (GeneralTracker,), {"name": "silent"})(), r"it has no log\(self, values"),
    ],
)
def test_what_is_no_tracker_is_refused(asked, message):
    with pytest.raises(ConfigurationError, match=message):
        Accelerator(log_with=asked)


def test_names_that_cannot_be_registered_are_refused():
    with pytest.raises(InvalidSpecError, match="'My Tracker' is not a plugin name"):
        register_tracker(type("Mine", (Memory,), {"name": "My Tracker"}))
    with pytest.raises(ConfigurationError, match="dict is no tracker"):
        register_tracker(dict)


def test_trackers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UnknownPluginError, match="pip install torchport-neptune"):
        Accelerator(log_with="neptune")
    accelerator = Accelerator(project_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="TORCHPORT_TRACKERS=jsonl"):
        accelerator.get_tracker("jsonl")
    with pytest.raises(ConfigurationError, match="has init_kwargs for wandb"):
        accelerator.init_trackers("run", init_kwargs={"wandb": {}})
    with pytest.raises(ConfigurationError, match="log has log_kwargs for wandb"):
        accelerator.log({"loss": 1.0}, log_kwargs={"wandb": {}})


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path, capsys):
    broken, memory = Broken(), Memory()
    accelerator = Accelerator(log_with=[broken, memory])
    accelerator.init_trackers("run")
    for step in range(12):
        accelerator.log({"loss": 1.0}, step)
    assert len([call for call in memory.calls if call[0] == "log"]) == 12
    assert broken.attempts == 10
    assert capsys.readouterr().err.splitlines() == [
        "torchport: tracker 'broken' failed at metrics, and training goes on: OSError: the disk is full",
        "torchport: tracker 'broken' failed 10 times in a row and is not called any more",
    ]
    accelerator.get_tracker("broken").anything("goes", nowhere=True)
    accelerator.end_training()


def test_a_tracker_that_recovers_stays(capsys):
    broken = Broken()
    accelerator = Accelerator(log_with=broken)
    accelerator.init_trackers("run")
    for step in range(30):
        broken.fails = ("log",) if step % 6 else ()
        accelerator.log({"loss": 1.0}, step)
    assert broken.attempts == 30
    assert len(capsys.readouterr().err.splitlines()) == 1
    accelerator.end_training()


@pytest.mark.parametrize("when", ["open", "log", "close"])
@pytest.mark.parametrize("strict", ["argument", "variable", None])
def test_a_failure_stops_the_training_only_where_asked_to(when, strict, registered, monkeypatch, capsys):
    registered(type("BrokenThere", (Broken,), {"fails": (when,)}))
    if strict == "variable":
        monkeypatch.setenv("TORCHPORT_TRACKERS_STRICT", "1")
    accelerator = Accelerator(log_with="broken")

    def train():
        accelerator.init_trackers("run", strict=True if strict == "argument" else None)
        accelerator.log({"loss": 1.0})
        accelerator.end_training()

    if strict:
        with pytest.raises(TrackerError, match=r"tracker 'broken'.*\n  reason: OSError: the "):
            train()
    else:
        train()
        assert capsys.readouterr().err.count("torchport: tracker 'broken' failed at") == 1


def test_arguments_that_a_tracker_does_not_take_are_the_user_s_mistake(tmp_path):
    accelerator = Accelerator(log_with="jsonl", project_dir=tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"init_kwargs\['jsonl'\](.|\n)*unexpected keyword argument 'colour'"
    ):
        accelerator.init_trackers("run", init_kwargs={"jsonl": {"colour": "red"}})


def test_images_and_tables_go_to_those_that_take_them(tmp_path, capsys):
    accelerator = Accelerator(log_with=["jsonl", Memory], project_dir=tmp_path)
    accelerator.init_trackers("run")
    for step in range(2):
        accelerator.log_images({"zeros": np.zeros((1, 2, 2, 3), np.uint8)}, step)
        accelerator.log_table("scores", ["a"], [[step]], step=step)
    assert [line.get("scores") for line in lines(tmp_path / "run.jsonl")] == [
        None,
        [{"a": 0}],
        None,
        [{"a": 1}],
    ]
    assert len(list((tmp_path / "run.images").iterdir())) == 2
    accelerator.end_training()
    assert capsys.readouterr().err.splitlines() == [
        "torchport: tracker 'memory' does not take images: it records none",
        "torchport: tracker 'memory' does not take tables: it records none",
    ]


def test_logging_before_the_trackers_are_open_is_said_once(capsys, tmp_path):
    accelerator = Accelerator(log_with="jsonl", project_dir=tmp_path)
    accelerator.log({"loss": 1.0})
    accelerator.log({"loss": 1.0})
    assert capsys.readouterr().err == (
        "torchport: log() before init_trackers(): nothing is recorded by jsonl\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_opening_again_closes_what_was_open(tmp_path):
    accelerator = Accelerator(log_with=["jsonl", Memory], project_dir=tmp_path)
    accelerator.init_trackers("fold-0")
    first = accelerator.get_tracker("memory")
    accelerator.init_trackers("fold-1")
    assert first.calls[-1] == ("finish",)
    accelerator.log({"loss": 1.0})
    accelerator.end_training()
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == ["fold-0.jsonl", "fold-1.jsonl"]
    assert (tmp_path / "fold-0.jsonl").read_text() == ""


SCRIPT = """
    import os, sys
    from torchport import Accelerator
    from torchport.tracking import GeneralTracker, on_main_process

    class Everywhere(GeneralTracker):
        name = "everywhere"
        main_process_only = False
        def __init__(self, run_name):
            self.lines = open(f"{run_name}-{os.environ.get('RANK', 0)}.txt", "w")
        @on_main_process
        def log(self, values, step=None):
            self.lines.write(f"{values['rank']}\\n")
        def finish(self):
            self.lines.write("closed\\n")
            self.lines.close()

    class Mine(GeneralTracker):
        name = "mine"
        @on_main_process
        def __init__(self):
            self.values = []
        @property
        @on_main_process
        def tracker(self):
            return self.values
        @on_main_process
        def log(self, values, step=None):
            self.values.append(values["rank"])

    mine = Mine()
    accelerator = Accelerator(log_with=["jsonl", mine, Everywhere])
    accelerator.init_trackers("run")
    accelerator.log({"rank": accelerator.process_index})
    accelerator.get_tracker("jsonl").log({"direct": accelerator.process_index})
    mine.log({"rank": 7})
    names = [tracker.name for tracker in accelerator.trackers]
    print(accelerator.process_index, names, accelerator.get_tracker("mine", unwrap=True), flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assert open("run-0.txt").read() == ""
"""


def test_only_the_main_process_tracks_and_what_is_left_open_is_closed_at_exit(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torchport", "launch", "--num-processes", "2", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "[rank0]: 0 ['jsonl', 'mine', 'everywhere'] [0, 7]",
        "[rank1]: 1 ['everywhere'] None",
    ]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines(tmp_path / "run.jsonl")] == [
        {"rank": 0},
        {"direct": 0},
    ]
    assert (tmp_path / "run-0.txt").read_text() == "0\nclosed\n"
    assert (tmp_path / "run-1.txt").read_text() == "1\nclosed\n"
