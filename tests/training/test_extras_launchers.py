"""Functions that become jobs: from a notebook, and to debug."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn
from torchport import Accelerator, PartialState, debug_launcher, notebook_launcher
from torchport.checkpoint import atomic
from torchport.errors import ConfigurationError, LaunchError, WorkerError
from torchport.state import AcceleratorState
from torchport.tracking import GeneralTracker

pytestmark = [pytest.mark.multiprocess, pytest.mark.alone]


@pytest.fixture(autouse=True)
def no_run():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _hear_interrupts() -> None:
    """Undo what a shell does to jobs in its background, should the tests be one: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(weights):
    """Train for a step on data that differs by process, and compare the result over processes."""
    accelerator = Accelerator()
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.full((1, 2), float(accelerator.process_index))).sum())
    optimizer.step()
    return accelerator, accelerator.unwrap_model(model).weight.detach()


def test_a_function_trains_in_two_processes_on_the_cpu(tmp_path):
    weights = torch.ones(1, 2)  # neither this nor the function could be pickled by name

    def work(folder):
        accelerator, trained = train(weights)
        assert torch.equal(trained, torch.full((1, 2), 0.5))
        assert accelerator.num_processes == 2
        assert accelerator.device.type == "cpu"
        (folder / str(accelerator.process_index)).write_text(str(os.getpid()))

    debug_launcher(work, args=(tmp_path,))
    pids = {int((tmp_path / name).read_text()) for name in "01"}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_processes_use_several_threads_though_the_notebook_has_used_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    matrix = torch.randn(600, 600)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    (matrix @ matrix).exp().sum()  # OpenMP's threads now exist

    def work():
        assert torch.get_num_threads() == 2
        (matrix @ matrix).exp().sum()
        (tmp_path / os.environ["RANK"]).touch()

    debug_launcher(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    (matrix @ matrix).exp().sum()
    torch.set_num_threads(before)


def test_the_failing_process_raises_here_with_its_traceback_and_the_others_are_ended(tmp_path):
    def fail_on_rank_one():
        state = PartialState()
        (tmp_path / str(state.process_index)).write_text(str(os.getpid()))
        state.wait_for_everyone()
        if state.process_index == 1:
            raise ValueError("the reason")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        notebook_launcher(fail_on_rank_one, num_processes=3, use_port="0")
    assert time.monotonic() - started < 30
    assert caught.value.problem == "rank 1 of notebook_launcher failed first: ValueError: the reason"
    assert "in fail_on_rank_one\n    raise ValueError(" in str(caught.value)
    assert "forked.py" not in str(caught.value)
    pids = [int((tmp_path / name).read_text()) for name in "012"]
    assert not any(alive(pid) for pid in pids)


def test_the_first_failure_is_named_and_not_what_it_brings_about():
    def fail():
        state = PartialState()
        state.wait_for_everyone()
        if state.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        state.wait_for_everyone()

    with pytest.raises(WorkerError, match="rank 1 of debug_launcher failed first: killed by SIGKILL"):
        debug_launcher(fail)


class Buffered(GeneralTracker):
    """Keeps metrics until it is closed."""

    name = "buffered"
    requires_logging_directory = False

    def __init__(self, run_name):
        self.file, self.values = run_name, []

    def log(self, values, step=None, **kwargs):
        self.values.append(values)

    def finish(self):
        with open(self.file, "a") as file:
            file.write(f"{self.values}\n")


def test_a_process_ends_as_a_script_does(tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    atexit.register(ours.touch)

    def work(fails):
        atexit.register((tmp_path / f"left{os.environ['RANK']}").touch)
        accelerator = Accelerator(log_with=Buffered)
        accelerator.init_trackers(str(tmp_path / "metrics"))
        accelerator.log({"loss": 1.0})
        if fails:
            monkeypatch.setattr(atomic, "publish", None)
        accelerator.save_state(tmp_path / "saved", blocking=False)

    debug_launcher(work, args=(False,))
    assert (tmp_path / "saved" / "manifest.json").exists()
    assert (tmp_path / "metrics").read_text() == "[{'loss': 1.0}]\n"  # the tracker of the main process
    assert not ours.exists()  # that is this process's handler
    assert {path.name for path in tmp_path.glob("left*")} == {"left0", "left1"}

    with pytest.raises(WorkerError, match=r"of debug_launcher failed first: .*CheckpointError: ") as caught:
        debug_launcher(work, args=(True,))
    assert "forked.py" not in str(caught.value)
    assert (tmp_path / "metrics").read_text() == "[{'loss': 1.0}]\n" * 2
    atexit.unregister(ours.touch)


def test_an_exit_code_is_a_failure_unless_it_is_zero():
    debug_launcher(sys.exit, args=(0,))
    with pytest.raises(WorkerError, match="failed first: SystemExit: 3"):
        debug_launcher(sys.exit, args=(3,))


def test_what_a_process_has_started_ends_with_it(tmp_path):
    def start_and_fail():
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / os.environ["RANK"]).write_text(str(child.pid))
        raise RuntimeError

    with pytest.raises(WorkerError, match="RuntimeError"):
        debug_launcher(start_and_fail, num_processes=1)
    child = int((tmp_path / "0").read_text())
    assert until(lambda: not alive(child))


ORPHANS = """
    import os, sys, time
    from torchport import debug_launcher
    def work():
        print(os.getpid(), flush=True)
        time.sleep(60)
    debug_launcher(work)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_launched_it(number):
    command = [sys.executable, "-c", textwrap.dedent(ORPHANS)]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interrupts,
    )
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    parent.send_signal(number)
    parent.wait(timeout=30)
    assert until(lambda: not any(alive(pid) for pid in pids))
    errors = parent.communicate()[1]
    assert ("KeyboardInterrupt" in errors) is (number == signal.SIGINT)


def test_an_interrupt_amid_the_start_of_a_process_ends_that_process_too():
    interrupt = "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), 2))"
    script = textwrap.dedent(ORPHANS).replace("def work", f"{interrupt}\ndef work")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=_hear_interrupts,
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert "ignored" not in ended.stderr
    assert ended.returncode == -signal.SIGINT


def test_a_job_that_fails_is_started_anew_as_often_as_asked(tmp_path, capfd):
    def work(fails):
        state = PartialState()
        state.wait_for_everyone()
        attempt = len(list(tmp_path.glob(f"{state.process_index}-*")))
        (tmp_path / f"{state.process_index}-{attempt}").touch()
        if attempt < fails and state.is_main_process:
            raise OSError("again")
        state.wait_for_everyone()

    notebook_launcher(work, args=(1,), num_processes=2, use_port="0", max_restarts=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]
    assert (
        "rank 0 of notebook_launcher failed first: OSError: again; starting anew (1 of 1)"
        in capfd.readouterr().err
    )
    with pytest.raises(WorkerError, match="again"):
        notebook_launcher(work, args=(9,), num_processes=2, use_port="0", max_restarts=1)


def test_an_elastic_job_is_left_to_the_agent_of_torchrun(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)

    def work(fails):
        state = PartialState()
        assert state.topology.source == "torchrun"
        assert state.num_processes == 2
        state.wait_for_everyone()
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        (tmp_path / f"{state.process_index}-{attempt}").touch()
        if attempt < fails:
            raise OSError("again")
        state.wait_for_everyone()

    options = {
        "num_processes": 2,
        "use_port": "0",
        "max_restarts": 1,
        "rdzv_backend": "c10d",
        "rdzv_id": "job",
    }
    notebook_launcher(work, args=(1,), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]
    with pytest.raises(WorkerError, match=r"(?s)at attempt 2 of 2: OSError: again.*in work"):
        notebook_launcher(work, args=(9,), **options)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_one_process_runs_in_place_and_leaves_no_run_behind(monkeypatch):
    seen = []

    def work(value):
        accelerator = Accelerator()
        seen.append((value, os.getpid(), accelerator.mixed_precision))

    notebook_launcher(work, args=(1,), mixed_precision="bf16")  # one per device: one on a CPU
    notebook_launcher(work, args=(2,), num_processes=1)
    assert seen == [(1, os.getpid(), "bf16"), (2, os.getpid(), "no")]
    assert "TORCHPORT_PRECISION" not in os.environ
    debug_launcher(PartialState)


def test_the_precision_reaches_the_processes_and_an_unknown_one_is_traced_to_the_call():
    def work():
        assert Accelerator().mixed_precision == "bf16"

    notebook_launcher(work, num_processes=2, mixed_precision="bf16", use_port="0")
    with pytest.raises(WorkerError, match=r"notebook_launcher \(TORCHPORT_PRECISION\)"):
        notebook_launcher(Accelerator, num_processes=2, mixed_precision="fp7", use_port="0")


def test_ranks_count_on_over_machines():
    def work():
        state = PartialState()
        place = state.topology
        assert (state.num_processes, place.num_nodes, place.local_world_size) == (4, 2, 2)
        assert state.process_index == 2 * place.node_rank + place.local_rank
        state.wait_for_everyone()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; from torchport import PartialState, notebook_launcher\n"
    )
    body = textwrap.dedent(
        f"""
        def work():
            state = PartialState()
            assert state.process_index == 2 + state.local_process_index, state
            state.wait_for_everyone()
        notebook_launcher(work, num_processes=2, use_port="{port}", node_rank=1, num_nodes=2)
        """
    )
    other = subprocess.Popen([sys.executable, "-c", script + body], stderr=subprocess.PIPE, text=True)
    notebook_launcher(work, num_processes=2, use_port=port, node_rank=0, num_nodes=2)
    errors = other.communicate(timeout=60)[1]
    assert (other.returncode, errors) == (0, "")


def test_a_process_that_has_a_run_is_not_forked():
    PartialState()
    for launcher in (notebook_launcher, debug_launcher):
        with pytest.raises(LaunchError, match="has an Accelerator or PartialState already"):
            launcher(print, num_processes=2)


def test_a_process_that_has_used_the_device_is_not_forked(monkeypatch):
    device = type("Device", (), {"is_initialized": staticmethod(lambda: True)})
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    debug_launcher(print)  # which does not want that device
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    with pytest.raises(LaunchError, match=r"torch\.cpu is initialized"):
        debug_launcher(print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "train"}, "needs a function to run"),
        ({"args": 1}, r"args=1\) is not a tuple of arguments\n  try:    args=\(1,\)"),
        ({"num_processes": 0}, "num_processes=0 must be a whole number, at least 1"),
        ({"num_nodes": 0}, "num_nodes=0 must be a whole number, at least 1"),
        ({"max_restarts": -1}, "max_restarts=-1 must be a whole number, at least 0"),
        ({"node_rank": 2, "num_nodes": 2}, "node_rank=2 is not the index of one of 2 machines"),
        ({"use_port": "http"}, "use_port='http' is not a TCP port"),
        ({"use_port": "0", "num_nodes": 2}, "all machines must know which"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        notebook_launcher(**{"function": print, "num_processes": 2, **options})


def test_a_port_that_is_taken_is_refused_with_what_to_give_instead():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(LaunchError, match=r"(?s)cannot meet at port \d+.*use_port='0' takes a free one"):
            notebook_launcher(print, num_processes=2, use_port=taken.getsockname()[1])


def cell(source: str):
    import nbformat

    return nbformat.v4.new_code_cell(textwrap.dedent(source).strip())


def test_a_notebook_trains_in_two_processes_and_shows_what_they_print_and_raise(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        cell(
            """
            import torch
            from torchport import Accelerator, notebook_launcher
            data = torch.arange(4.0)
            (torch.ones(600, 600) @ torch.ones(600, 600)).exp().sum()  # starts OpenMP's threads

            def training(scale):
                accelerator = Accelerator()
                mine = data[accelerator.process_index :: accelerator.num_processes]
                total = accelerator.reduce(mine.sum() * scale, "sum")
                print(f"rank {accelerator.process_index}: {total:.0f}")
            """
        ),
        cell("notebook_launcher(training, args=(10.0,), num_processes=2, use_port='0')"),
        cell("notebook_launcher(training, args=(1.0,))"),
        cell("notebook_launcher(training, args=('x',), num_processes=2, use_port='0')"),
        cell("Accelerator()\nnotebook_launcher(training, args=(1.0,), num_processes=2, use_port='0')"),
    ]
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}},
        allow_errors=True,
    )  # fmt: skip
    client.execute()

    def text(number: int) -> str:
        outputs = notebook.cells[number].outputs
        return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")

    def error(number: int) -> str:
        (found,) = [output for output in notebook.cells[number].outputs if output.output_type == "error"]
        return f"{found.ename}: {found.evalue}"

    assert sorted(text(1).splitlines()) == ["rank 0: 60", "rank 1: 60"]
    assert text(2) == "rank 0: 6\n"
    assert error(3).startswith("WorkerError: rank ")
    assert "total = accelerator.reduce(mine.sum() * scale" in error(3)
    assert "has an Accelerator or PartialState already" in error(4)
