"""`torchport launch` on one machine: what the script sees, what the user sees."""

from __future__ import annotations

import json
import os
import re
import socket
import sys

import pytest

pytestmark = pytest.mark.multiprocess

SHOW = """
    import json, os, sys
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    print(json.dumps({
        "pid": os.getpid(), "argv": sys.argv[1:], "ranks": {name: os.environ.get(name) for name in names},
        "environ": dict(os.environ),
    }), flush=True)
"""


def shown(finished) -> list[dict]:
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_one_process_replaces_the_launcher(launches):
    launches.write("show.py", SHOW)
    process = launches.start("show.py")
    stdout, stderr = process.communicate(timeout=60)
    assert (json.loads(stdout)["pid"], stderr) == (process.pid, "")


def test_one_process_is_rank_0_of_1(launches):
    launches.write("show.py", SHOW)
    outer = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "outer"}
    [worker] = shown(launches.run("show.py", **outer))
    port = worker["ranks"].pop("MASTER_PORT")
    assert worker["ranks"] == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert 1024 <= int(port) <= 65535
    assert "TORCHELASTIC_RUN_ID" not in worker["environ"]


def test_each_of_several_processes_gets_its_rank_and_a_common_place_to_meet(launches):
    launches.write("show.py", SHOW)
    workers = shown(launches.run("--num-processes", "3", "--no-log-prefix", "show.py"))
    workers.sort(key=lambda worker: worker["ranks"]["RANK"])
    assert [w["ranks"]["RANK"] for w in workers] == ["0", "1", "2"]
    assert [w["ranks"]["LOCAL_RANK"] for w in workers] == ["0", "1", "2"]
    assert (
        {w["ranks"]["WORLD_SIZE"] for w in workers}
        == {w["ranks"]["LOCAL_WORLD_SIZE"] for w in workers}
        == {"3"}
    )
    assert {(w["ranks"]["GROUP_RANK"], w["ranks"]["MASTER_ADDR"]) for w in workers} == {("0", "127.0.0.1")}
    assert len({w["ranks"]["MASTER_PORT"] for w in workers}) == 1
    assert len({w["pid"] for w in workers}) == 3


@pytest.mark.parametrize("processes", ["1", "2"])
def test_arguments_of_the_script_pass_through_untouched(launches, processes):
    launches.write("show.py", SHOW)
    arguments = ["--num-processes", "7", "--help", "-m", "--", "", "a b", "--no_such=flag"]
    workers = shown(launches.run("--num_processes", processes, "--no_log_prefix", "show.py", *arguments))
    assert [worker["argv"] for worker in workers] == [arguments] * int(processes)


def test_a_module_runs_as_python_m_and_is_not_imported_by_the_launcher(launches):
    launches.write("pack/__init__.py", "import os\nprint('imported in', os.getpid())")
    launches.write("pack/train.py", "import os, sys\nprint('run in', os.getpid(), sys.argv[1:])")
    process = launches.start("-m", "pack.train", "--lr", "1")
    stdout, stderr = process.communicate(timeout=60)
    assert stdout.splitlines() == [f"imported in {process.pid}", f"run in {process.pid} ['--lr', '1']"], (
        stderr
    )


def test_a_program_runs_by_itself_with_no_python(launches):
    launches.write("program", "#!/bin/sh\necho $RANK of $WORLD_SIZE: $1\n").chmod(0o755)
    finished = launches.run("-n", "2", "--no-python", "./program", "x")
    assert (finished.returncode, finished.lines) == (0, ["[rank0]: 0 of 2: x", "[rank1]: 1 of 2: x"])


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_exit_code_of_the_script_is_the_exit_code_of_the_launch(launches, processes):
    launches.write("leave.py", "import sys; sys.exit(3)")
    assert launches.run("--num-processes", processes, "leave.py").returncode == 3


# --- output ---


def test_each_line_is_prefixed_once_with_its_rank(launches):
    launches.write("talk.py", """
        import os, sys
        rank = os.environ["RANK"]
        print("one\\ntwo")
        print(f"[rank{rank}]: spoken by torch", file=sys.stderr)
        print("three", file=sys.stderr)
        sys.stderr.write("no newline at the end")
    """)  # fmt: skip
    finished = launches.run("-n", "2", "talk.py")
    assert finished.lines == [f"[rank{rank}]: {word}" for rank in (0, 1) for word in ("one", "two")]
    assert sorted(finished.stderr.splitlines()) == [
        f"[rank{rank}]: {line}"
        for rank in (0, 1)
        for line in ("no newline at the end", "spoken by torch", "three")
    ]


def test_very_long_lines_pass_whole(launches):
    launches.write("long.py", "import os; print('x' * 3_000_000 if os.environ['RANK'] == '1' else 'short')")
    finished = launches.run("--num-processes", "2", "--no-log-prefix", "long.py")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("x") == 3_000_000


def test_progress_bars_and_prompts_are_shown_before_their_line_ends(launches):
    launches.write("bar.py", """
        import os, sys
        for percent in (0, 50, 100):
            sys.stderr.write(f"\\r{percent}%")
        sys.stderr.write("\\n")
        if os.environ["RANK"] == "0":
            print("answer:", input("question? "))
    """)  # fmt: skip
    process = launches.start("-n", "2", "bar.py", stdin="")
    seen = ""
    while "question? " not in seen:
        seen += process.stdout.read(1)
    stdout, stderr = process.communicate("yes\n", timeout=60)
    assert seen + stdout == "[rank0]: question? answer: yes\n"
    for rank in (0, 1):
        assert re.findall(rf"\[rank{rank}\]: (\d+%)", stderr) == ["0%", "50%", "100%"]


def test_rank_0_reads_standard_input_and_the_others_find_it_empty(launches):
    launches.write("read.py", "import sys; print(repr(sys.stdin.read()))")
    assert launches.run("-n", "2", "read.py", stdin="for all\n").lines == [
        "[rank0]: 'for all\\n'",
        "[rank1]: ''",
    ]


@pytest.mark.parametrize(
    ("tee", "stdout", "stderr"),
    [("0", False, False), ("1", True, False), ("2", False, True), ("3", True, True)],
)
def test_tee_chooses_the_streams_on_the_console_and_log_dir_keeps_all(launches, tee, stdout, stderr):
    launches.write("talk.py", "import sys; print('out'); print('err', file=sys.stderr)")
    finished = launches.run("-n", "2", "--log-dir", "logs/deep", "--tee", tee, "talk.py")
    assert finished.lines == ["[rank0]: out", "[rank1]: out"] * stdout
    assert sorted(finished.stderr.splitlines()) == ["[rank0]: err", "[rank1]: err"] * stderr
    files = {path.name: path.read_text() for path in (launches.folder / "logs/deep").iterdir()}
    assert files == {
        "rank0.stdout.log": "out\n", "rank0.stderr.log": "err\n", "rank1.stdout.log": "out\n", "rank1.stderr.log": "err\n",
    }  # fmt: skip


def test_one_process_with_a_log_dir_is_logged(launches):
    launches.write("talk.py", "print('out')")
    assert launches.run("--log-dir", "logs", "talk.py").stdout == "[rank0]: out\n"
    assert (launches.folder / "logs/rank0.stdout.log").read_text() == "out\n"


def test_a_traceback_that_was_caught_and_logged_is_shown_though_the_job_goes_on(launches):
    launches.write("log.py", """
        import os, pathlib, time, traceback
        if os.environ["RANK"] == "1":
            try:
                1 / 0
            except ZeroDivisionError:
                traceback.print_exc()
            pathlib.Path("printed").touch()
        while not pathlib.Path("done").exists():
            time.sleep(0.01)
    """)  # fmt: skip
    process = launches.start("-n", "2", "log.py")
    launches.wait_for("printed")
    seen = ""
    while "ZeroDivisionError" not in seen:
        seen += process.stderr.readline()
    (launches.folder / "done").touch()
    assert process.wait(60) == 0
    assert seen.startswith("[rank1]: Traceback (most recent call last):\n")


def test_output_without_a_reader_ends_the_job_as_in_any_pipeline(launches):
    launches.write("talk.py", "while True: print('x' * 1000)")
    process = launches.start("-n", "2", "talk.py")
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 128 + 13
    launches.wait_until_gone(within=2)


# --- the environment of the workers ---


def test_a_flag_comes_before_a_variable_and_that_before_the_file(launches):
    launches.write("show.py", SHOW)
    launches.write("config.yaml", "mixed_precision: fp16\nstrategy: ddp\ngradient_accumulation_steps: 4\n")
    finished = launches.run(
        "--config_file", "config.yaml", "--precision", "bf16", "show.py",
        TORCHPORT_PRECISION="no", TORCHPORT_STRATEGY="single",
    )  # fmt: skip
    environ = shown(finished)[0]["environ"]
    assert environ["TORCHPORT_PRECISION"] == "bf16"
    assert environ["TORCHPORT_STRATEGY"] == "single"
    assert environ["TORCHPORT_GRADIENT_ACCUMULATION_STEPS"] == "4"
    assert environ["TORCHPORT_ORIGINS"] == (
        "TORCHPORT_GRADIENT_ACCUMULATION_STEPS=config.yaml: gradient_accumulation_steps;TORCHPORT_PRECISION=--precision"
    )
    assert finished.stderr == "torchport: --precision (precision=bf16) overrides TORCHPORT_PRECISION=no\n"


def test_documented_variables_and_flags_fill_the_same_slots(launches):
    launches.write("show.py", SHOW)
    [worker] = shown(launches.run("--cpu", "--use_xpu", "show.py", ACCELERATE_MIXED_PRECISION="bf16"))
    assert worker["environ"]["TORCHPORT_BACKEND"] == "cpu"
    assert worker["environ"]["TORCHPORT_PRECISION"] == "bf16"


def test_settings_of_a_plugin_travel_as_its_variables(launches):
    launches.write("show.py", SHOW)
    launches.write("config.yaml", "ddp_config: {ddp_bucket_cap_mb: 3, ddp_dim: 1, ddp_static_graph: true}\n")
    flags = ["--config-file", "config.yaml", "--ddp_dim", "2", "--ddp_find_unused_parameters", "true"]
    [worker] = shown(launches.run(*flags, "show.py", "true", DDP_BUCKET_CAP_MB="7"))
    environ = worker["environ"]
    names = ("DDP_BUCKET_CAP_MB", "DDP_DIM", "DDP_STATIC_GRAPH", "DDP_FIND_UNUSED_PARAMETERS")
    assert [environ[name] for name in names] == ["7", "2", "True", "True"]
    assert worker["argv"] == ["true"]


def test_threads_are_shared_out_unless_they_were_chosen(launches):
    launches.write("threads.py", "import os; print(os.environ['OMP_NUM_THREADS'])")
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    two = ("-n", "2", "--no-log-prefix")
    assert launches.run(*two, "threads.py").lines == [share] * 2
    assert launches.run(*two, "threads.py", OMP_NUM_THREADS="5").lines == ["5"] * 2
    flag = ("--num_cpu_threads_per_process", "3")
    assert launches.run(*two, *flag, "threads.py", OMP_NUM_THREADS="5").lines == ["3"] * 2


def test_the_launcher_never_imports_torch(launches):
    launches.write("talk.py", "print('out')")
    python = (sys.executable, "-X", "importtime", "-m", "torchport", "launch")
    finished = launches.run("--num-processes", "2", "talk.py", command=python)
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "torchport.builtin.supervisor" in imported
    assert not {"torch", "rich", "yaml"} & imported


# --- what cannot work is refused before anything starts ---


def refused(finished) -> str:
    assert (finished.returncode, finished.stdout) == (2, ""), finished.stdout + finished.stderr
    return finished.stderr


def test_a_missing_script_is_reported_with_the_nearest_name(launches):
    launches.write("train.py", "print('started')")
    error = refused(launches.run("-n", "2", "trian.py"))
    assert "the script 'trian.py' does not exist" in error
    assert "did you mean 'train.py'?" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-processes", "0", "ok.py"], "--num-processes must be at least 1\n  found:  0"),
        (["--num-processes", "two", "ok.py"], "--num-processes must be a whole number"),
        (["--num-processes", "3", "--num-machines", "2", "--main-process-ip", "x", "ok.py"], "3 processes cannot be divided among 2 machines"),
        (["--num-processes", "4", "--num-machines", "2", "--machine-rank", "2", "ok.py"], "--machine-rank must be from 0 to 1"),
        (["--num-processes", "4", "--num-machines", "2", "ok.py"], "needs the address of machine 0"),
        (["--main-process-port", "70000", "ok.py"], "--main-process-port must be a TCP port"),
        (["--tee", "7", "ok.py"], "--tee must be one of 0, 1, 2, 3"),
        (["--log-dir", "ok.py/logs", "ok.py"], "--log-dir: nothing can be written in"),
        (["--launcher", "local", "--max-restarts", "1", "ok.py"], "it cannot do: restarts"),
        (["--launcher", "local", "--num-processes", "2", "--num-machines", "2", "ok.py"], "it cannot do: machines"),
        (["--backend", "acme", "ok.py"], "--backend (TORCHPORT_BACKEND) asks for the backend 'acme', but no installed plugin offers it"),
        (["--use_fsdpp", "ok.py"], "No such option '--use-fsdpp'"),
        (["--sagemaker_role", "3", "ok.py"], "pip install torchport-sagemaker"),
        pytest.param(
            ["--zero_stage", "7", "ok.py"], "--zero-stage must be one of 0, 1, 2, 3", marks=pytest.mark.plugins
        ),
        (["--cpu", "--backend", "acme", "ok.py"], "leave out one of them"),
        (["--gpu_ids", "0,1", "--cpu", "ok.py"], "--gpu-ids chooses devices 0, 1"),
        (["--dynamo_use_fullgraf", "ok.py"], "No such option '--dynamo-use-fullgraf'"),
        (["--config-file", "none.yaml", "ok.py"], "the configuration file 'none.yaml' cannot be read"),
        (["--module", "--no-python", "ok"], "exclude each other"),
        (["-m", "pack.none"], "no module named 'pack.none'"),
        (["-m", "pack"], "'pack' is a package without a __main__ module"),
        (["-m", "ok.py"], "for a file leave out -m"),
        (["pack"], "is a folder without a __main__.py"),
        (["folder/none.py"], "there is no folder 'folder'"),
        (["--no-python", "./ok.py"], "'./ok.py' is not executable"),
        (["--no-python", "no-such-program"], "'no-such-program' was not found"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_process_starts(launches, arguments, expected):
    launches.write("ok.py", "print('started')")
    launches.write("pack/__init__.py", "print('imported')")
    assert expected in refused(launches.run(*arguments))


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_in_use_is_refused(launches, processes):
    launches.write("ok.py", "print('started')")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        error = refused(launches.run("-n", processes, "--main-process-port", port, "ok.py"))
    assert (
        f"--main-process-port asks for port {port}, which cannot be used\n  reason: Address already in use"
        in error
    )


def test_a_program_that_the_system_cannot_execute_is_refused(launches):
    launches.write("program", "no interpreter line").chmod(0o755)
    for processes in ("1", "2"):
        assert "'./program' cannot be executed" in refused(
            launches.run("-n", processes, "--no-python", "./program")
        )


def test_help_lists_the_flags_of_the_core_of_plugins_and_the_older_spellings(launches):
    finished = launches.run("--help")
    assert finished.returncode == 0
    assert "--num-processes N" in finished.stdout
    assert "Settings of the strategy ddp" in finished.stdout
    assert "--ddp-bucket-cap-mb" in finished.stdout
    assert "--mixed-precision" in finished.stdout
