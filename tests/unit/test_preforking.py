"""The programs of `tests/support` do what an interpreter does."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import prefork_client
import pytest

TELL = """
import json, os, signal, sys, warnings
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "name": __name__, "file": __file__,
    "main": sys.modules["__main__"].__dict__ is globals(), "variable": os.environ.get("VARIABLE"),
    "python": os.environ.get("PYTHONPATH") in sys.path, "hash": hash("word"), "threads": sys.modules["torch"].get_num_threads(),
    "ignored": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "input": sys.stdin.read(),
    "torchport": "torchport" in sys.modules, "default": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "warnings": [entry[0] for entry in warnings.filters][:1], "session": os.getsid(0) == os.getpid(),
}))
"""


@pytest.fixture(autouse=True)
def variables_as_at_the_start(prefork, monkeypatch):
    """Other tests of this process may have left variables that only a new interpreter reads."""
    fixed = json.loads((prefork / prefork_client.SETTINGS).read_text())["fixed"]
    for name in prefork_client.fixed_at_start(os.environ).keys() - fixed.keys():
        monkeypatch.delenv(name)
    for name, value in fixed.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def finish(command, **options):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_a_script_is_given_what_its_client_was_given(prefork, script, tmp_path):
    path = script(TELL)
    environ = {
        **os.environ, "VARIABLE": "value", "PYTHONPATH": str(tmp_path / "elsewhere"), "PYTHONWARNINGS": "error",
        "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    command = ["nohup", prefork / "python", path, "a", "-b"]
    told = json.loads(finish(command, cwd=tmp_path, env=environ, input="typed").stdout)
    del told["hash"]
    assert told == {
        "argv": [str(path), "a", "-b"], "path": str(tmp_path), "cwd": str(tmp_path), "name": "__main__", "file": str(path),
        "main": True, "variable": "value", "python": True, "threads": 3, "ignored": True, "input": "typed",
        "torchport": False, "default": True, "warnings": ["error"], "session": True,
    }  # fmt: skip


def test_strings_hash_differently_on_two_ranks(prefork, script):
    path = script("print(hash('word'))")
    hashes = {finish([prefork / "python", path], env={**os.environ, "RANK": rank}).stdout for rank in "01"}
    assert len(hashes) == 2


def test_a_script_ends_as_python_ends_it(prefork, script):
    path = script("""
        import atexit, os, signal, sys
        atexit.register(print, "at exit")
        how = sys.argv[1]
        if how == "raise":
            raise ValueError("no")
        if how == "exit":
            sys.exit(7)
        if how == "word":
            sys.exit("in words")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "abort":
            os.abort()
    """)
    for how in ("return", "raise", "exit", "word", "kill", "abort"):
        real, ours = (finish([python, path, how]) for python in (sys.executable, prefork / "python"))
        assert (ours.returncode, ours.stdout, ours.stderr) == (real.returncode, real.stdout, real.stderr), how


def test_a_module_is_run_as_the_main_module(prefork, script):
    path = script(TELL)
    done = finish([prefork / "python", "-u", "-m", "script", "a"], cwd=path.parent, stdin=subprocess.DEVNULL)
    told = json.loads(done.stdout)
    assert (told["argv"], told["path"], told["name"]) == ([str(path), "a"], str(path.parent), "__main__")


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["-c", "import sys; print('torch' in sys.modules)"], {}),
        (["-W", "error"], {}),
        ([], {"PYTHONHASHSEED": "0"}),
    ],
    ids=["code", "option", "variable"],
)
def test_what_only_a_new_interpreter_can_do_is_done_by_one(prefork, script, options, variables):
    path = script("import sys; print('torch' in sys.modules)")
    done = finish([prefork / "python", *options, path], env={**os.environ, **variables})
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_what_libraries_set_when_they_are_imported_needs_no_new_interpreter(prefork, script):
    path = script("import sys; print('torch' in sys.modules)")
    variables = {
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "KMP_INIT_AT_FORK": "FALSE",
        "TORCHINDUCTOR_CACHE_DIR": "cache",
    }
    assert finish([prefork / "python", path], env={**os.environ, **variables}).stdout == "True\n"


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_program_ends_its_process(prefork, script, number):
    path = script("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    client = subprocess.Popen(
        [prefork / "python", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(client.stdout.readline())
    client.send_signal(number)
    assert client.wait(timeout=30) == -number
    wait_for(lambda: not alive(pid))
    client.stdout.close()


def test_workers_of_a_launch_are_forked_and_the_command_line_is_not(prefork, script):
    path = script("import os, sys; print(os.environ['RANK'], 'torch' in sys.modules, sys.argv[1])")
    done = finish([prefork / "torchport", "launch", "--num-processes", "2", "--no-log-prefix", path, "word"])
    assert sorted(done.stdout.splitlines()) == ["0 True word", "1 True word"]
    assert finish([prefork / "torchport", "launch", path.parent / "nothing.py"]).returncode != 0
