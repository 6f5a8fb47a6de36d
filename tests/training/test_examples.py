"""The examples run as their own text says, and what they print is true."""

import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
WORKER = Path(__file__).parent / "workers" / "examples.py"
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

SHORT = {  # label: script and arguments, run in one process and in two
    "digits": ["digits.py", "--epochs", "1"],
    "accumulation": ["accumulation.py", "--epochs", "2"],
    "local_sgd": ["local_sgd.py", "--epochs", "4"],
    "early_stopping": ["early_stopping.py", "--target", "0.3"],
    "cross_validation": ["cross_validation.py", "--folds", "3", "--epochs", "2"],
    "metrics": ["metrics.py", "--epochs", "3"],
    "tracking": ["tracking.py", "--epochs", "2"],
    "profiler": ["profiler.py"],
    "profiler_too_late": ["profiler.py", "--skip", "100", "--output-dir", "late"],
    "memory": ["memory.py", "--epochs", "3", "--limit", "1"],
    "memory_enough": ["memory.py", "--epochs", "1", "--limit", "100"],
    "hook_no": ["ddp_comm_hook.py", "--epochs", "1", "--hook", "no"],
    "hook_bf16": ["ddp_comm_hook.py", "--epochs", "1", "--hook", "bf16"],
    "hook_power_sgd": ["ddp_comm_hook.py", "--epochs", "1", "--hook", "power_sgd", "--wrapper", "fp16"],
    "schedule_free": ["schedule_free.py", "--epochs", "2"],
    "language_model": ["language_model.py", "--steps", "60"],
    "inference": ["distributed_inference.py"],
    "tokens": ["autoregressive_accumulation.py", "--steps", "15", "--micro-batch", "4"],
    "tokens_in_one_batch": ["autoregressive_accumulation.py", "--steps", "15", "--micro-batch", "16"],
    "micro_batches": [
        "autoregressive_accumulation.py", "--steps", "15", "--micro-batch", "4", "--by-micro-batch"
    ],
    "tracking_again": ["tracking.py", "--epochs", "1"],
    "no_epochs": ["metrics.py", "--epochs", "0"],
    "one_fold": ["cross_validation.py", "--folds", "1"],
    "uneven_lines": ["autoregressive_accumulation.py", "--micro-batch", "5"],
    "no_model": ["distributed_inference.py", "--model", "nowhere"],
}  # fmt: skip
SHORT_IN_ONE = {
    **SHORT,
    "tokens_in_one_batch": ["autoregressive_accumulation.py", "--steps", "15", "--micro-batch", "32"],
}
both = pytest.mark.parametrize("processes", [1, 2])


def finish(command: list[str], folder: Path, timeout: float = 200) -> str:
    finished = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, env=ENVIRON
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def accuracy(output: str) -> float:
    return float(re.search(r"accuracy ([\d.]+) (?:on|in)", output)[1])


def numbers(pattern: str, output: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, output)]


class Ran:
    """What the short runs printed, and the folder that they ran in."""

    def __init__(self, command: list[str], commands: dict[str, list[str]], folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        listed = json.dumps([[label, *arguments] for label, arguments in commands.items()])
        started = subprocess.run(
            [*command, str(WORKER), str(folder), listed],
            capture_output=True, text=True, timeout=280, check=False, env=ENVIRON,
        )  # fmt: skip
        self.problem = started.stdout + started.stderr

    def status_and_output(self, label: str, rank: int = 0) -> tuple[int, str]:
        file = self.folder / f"{label}.{rank}.txt"
        assert file.exists(), f"an example before it failed, or hung\n{self.problem}"
        output, ended, status = file.read_text().rpartition("exit status ")
        assert ended, f"it did not end\n{file.read_text()}{self.problem}"
        return int(status), output

    def output(self, label: str, rank: int = 0) -> str:
        status, output = self.status_and_output(label, rank)
        assert status == 0, output
        return output


@pytest.fixture(scope="module")
def ran(tmp_path_factory, python, launch):
    """Run all short examples in one process, or in two, once."""
    done: dict[int, Ran] = {}

    def run(processes: int) -> Ran:
        if processes not in done:
            command = python if processes == 1 else launch(processes)
            commands = SHORT_IN_ONE if processes == 1 else SHORT
            done[processes] = Ran(command, commands, tmp_path_factory.mktemp(f"examples{processes}"))
        return done[processes]

    return run


def test_digits_learns_and_goes_on_from_its_checkpoint_with_the_same_result(launch, tmp_path):
    script = [str(EXAMPLES / "digits.py")]
    whole = finish([*launch(2), *script, "--epochs", "8", "--output-dir", "whole"], tmp_path)
    assert accuracy(whole) >= 0.95
    assert "plan for 2 processes" in whole
    finish([*launch(2), *script, "--epochs", "3", "--output-dir", "parts"], tmp_path)
    rest = finish([*launch(2), *script, "--epochs", "8", "--output-dir", "parts", "--resume"], tmp_path)
    assert "resumed after epoch 3" in rest
    assert accuracy(rest) == accuracy(whole)


@both
def test_digits_says_what_it_runs_on(ran, processes):
    output = ran(processes).output("digits")
    assert f"plan for {processes} process{'es'[: 2 * (processes - 1)]}" in output
    assert f"strategy     {'single' if processes == 1 else 'ddp'}" in output


def test_accumulation_learns_in_bfloat16_as_the_launcher_says(launch, tmp_path):
    output = finish([*launch(2), "--precision", "bf16", str(EXAMPLES / "accumulation.py")], tmp_path)
    assert accuracy(output) >= 0.9
    assert "in bf16" in output


@both
def test_every_example_runs_in_processes_that_ran_others_before(ran, processes):
    listed = {arguments[0] for arguments in SHORT.values()} | {
        "digits.py",
        "checkpointing.py",
        "arguments.py",
        "deepspeed_finetune.py",  # test_checkpoint_example.py
    }
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
    statuses = {label: ran(processes).status_and_output(label)[0] for label in SHORT}
    refused = {"no_epochs", "one_fold", "uneven_lines", "no_model"}
    assert statuses == {label: 2 if label in refused else 0 for label in SHORT}


@both
@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("no_epochs", "argument --epochs: 0 is less than 1"),
        ("one_fold", "--folds must be at least 2"),
        ("uneven_lines", "x 5 lines do not divide 32"),
        ("no_model", "there is no nowhere: python docs/examples/language_model.py"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_the_reason(ran, processes, label, complaint):
    assert complaint in ran(processes).status_and_output(label)[1]


@both
@pytest.mark.parametrize(
    ("label", "threshold"), [("accumulation", 0.8), ("local_sgd", 0.9), ("tracking", 0.85), ("memory", 0.85)]
)
def test_examples_learn(ran, processes, label, threshold):
    assert accuracy(ran(processes).output(label)) >= threshold


@both
def test_early_stopping_ends_all_processes_at_the_step_at_which_one_had_a_low_loss(ran, processes):
    output = ran(processes).output("early_stopping")
    ends = re.findall(r"process (\d) stopped at step (\d+)(: its loss was low enough)?", output)
    assert [int(rank) for rank, _, _ in ends] == list(range(processes))
    assert len({step for _, step, _ in ends}) == 1
    assert any(reason for _, _, reason in ends)
    assert 10 < int(ends[0][1]) < 10 * 90 // processes
    assert f"after {ends[0][1]} steps" in output


@both
def test_cross_validation_predicts_each_image_once_and_the_ensemble_beats_the_folds(ran, processes):
    output = ran(processes).output("cross_validation")
    folds = [(float(share), int(size)) for share, size in re.findall(r"fold \d: ([\d.]+) on (\d+)", output)]
    assert [size for _, size in folds] == [480, 479, 479]
    unseen, images = re.search(r"out of fold: accuracy ([\d.]+) on (\d+) images", output).groups()
    assert int(images) == 1438
    assert float(unseen) == pytest.approx(sum(share * size for share, size in folds) / 1438, abs=1e-4)
    ensemble = float(re.search(r"all 3 models: accuracy ([\d.]+) on 359", output)[1])
    alone = numbers(r"([\d.]+) on the held-out ones", output)
    assert len(alone) == 3
    assert ensemble >= max(0.85, statistics.median(alone))


def test_metrics_of_two_processes_are_exactly_those_of_one(ran):
    one, two = (ran(processes).output("metrics").splitlines() for processes in (1, 2))
    assert one[0] == "gather returned 359 labels, gather_for_metrics 359 of 359"
    assert two[0] == "gather returned 384 labels, gather_for_metrics 359 of 359"
    assert one[1:] == two[1:]
    assert one[1] == "in the order of the data set: True"
    score, best_two = (float(line.split()[-1]) for line in one[2:4])
    assert 0.9 < score < best_two < 1
    matrix = [[int(count) for count in re.findall(r"\d+", row)] for row in one[4:]]
    assert sum(map(sum, matrix)) == 359


@both
def test_tracking_writes_hyperparameters_losses_and_accuracies_to_one_file(ran, processes):
    again = accuracy(ran(processes).output("tracking_again"))
    records = [
        json.loads(line)
        for line in (ran(processes).work / "runs" / "tracking" / "digits.jsonl").read_text().splitlines()
    ]
    configs = [record["config"] for record in records if "config" in record]
    assert [(config["epochs"], config["processes"]) for config in configs] == [(2, processes), (1, processes)]
    last = 2 * 90 // processes
    assert [r["step"] for r in records if "loss" in r] == [
        *range(10, last + 1, 10),
        *range(10, last // 2 + 1, 10),
    ]
    scores = [r["accuracy"] for r in records if "accuracy" in r]
    assert len(scores) == 3
    assert scores[1] == pytest.approx(accuracy(ran(processes).output("tracking")), abs=5e-5)
    assert scores[2] == pytest.approx(again, abs=5e-5)
    assert scores[0] == scores[2]  # the second run is the first epoch of the first once more


@both
def test_profiler_writes_one_trace_for_each_rank_with_the_scheduled_steps_alone(ran, processes):
    output = ran(processes).output("profiler")
    assert "steps up to 9:" in output
    assert "aten::convolution_backward" in output
    assert "FLOPs" in output
    names = [f"profile_{rank}.json" for rank in range(processes)]
    assert f"traces in runs/profiler: {', '.join(names)}\n" in output
    for name in names:
        events = json.loads((ran(processes).work / "runs" / "profiler" / name).read_text())["traceEvents"]
        steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
        assert steps == {"ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"}
        sent = any(
            "all_reduce" in str(event.get("name")) or "allreduce" in str(event.get("name"))
            for event in events
        )
        assert sent == (processes == 2)


@both
def test_a_profile_that_begins_too_late_leaves_no_trace_and_no_error(ran, processes):
    assert "traces in late: none" in ran(processes).output("profiler_too_late")


@both
def test_memory_halves_the_batch_until_it_fits_and_accumulates_the_rest(ran, processes):
    output = ran(processes).output("memory")
    tried = [int(size) for size in numbers(r"trying (\d+) images", output)]
    assert tried == [64 // processes // 2**halvings for halvings in range(len(tried))]
    assert len(tried) > 1
    assert f"{tried[-1]} images per process and {64 // processes // tried[-1]} micro-batches" in output
    output = ran(processes).output("memory_enough")
    assert numbers(r"trying (\d+) images", output) == [64 // processes]
    assert f"{64 // processes} images per process and 1 micro-batches" in output


def test_communication_hooks_change_losses_a_little_and_only_between_processes(ran):
    for processes in (1, 2):
        losses = {
            hook: numbers(r"training loss ([\d.]+)", ran(processes).output(f"hook_{hook}"))[-1]
            for hook in ("no", "bf16", "power_sgd")
        }
        if processes == 1:
            assert losses["no"] == losses["bf16"] == losses["power_sgd"]
        else:
            assert 0 < abs(losses["bf16"] - losses["no"]) < 0.02
            assert abs(losses["bf16"] - losses["no"]) < abs(losses["power_sgd"] - losses["no"]) < 0.3


@both
def test_schedule_free_is_better_at_the_average_than_at_the_last_point(ran, processes):
    output = ran(processes).output("schedule_free")
    losses = re.findall(r"held-out loss ([\d.]+), of the average ([\d.]+)", output)
    assert len(losses) == 2
    assert all(float(average) < float(last) for last, average in losses)
    assert accuracy(output) >= 0.95


@both
def test_language_model_learns_more_than_the_frequencies_of_bytes(ran, processes):
    output = ran(processes).output("language_model")
    assert (
        numbers(r"held-out text: ([\d.]+) bits per byte", output)[0] < 4.3
    )  # their entropy there is about 4.7
    assert (ran(processes).work / "runs" / "language_model" / "model.safetensors").stat().st_size > 500_000


def test_inference_gives_the_same_texts_in_the_same_order_for_one_and_two_processes(ran, launch, tmp_path):
    weights = ran(1).work / "runs" / "language_model" / "model.safetensors"
    script = str(EXAMPLES / "distributed_inference.py")
    two = finish([*launch(2), script, "--model", str(weights)], tmp_path).replace("[rank0]: ", "")
    one = ran(1).output("inference")
    assert re.findall(r"process (\d)", one) == ["0"] * 9
    assert re.findall(r"process (\d)", two) == ["0"] * 5 + ["1"] * 4
    texts = re.findall(r"process \d: (.*)", one)
    assert texts == re.findall(r"process \d: (.*)", two)
    assert all(
        re.match(r"(['\"])(.*)\1 -> (['\"])\2.", text) for text in texts
    )  # each goes on with its prompt


def test_tokens_weigh_as_in_one_big_batch_however_they_are_split(ran):
    runs = [(1, "tokens_in_one_batch"), (1, "tokens"), (2, "tokens_in_one_batch"), (2, "tokens")]
    outputs = [ran(processes).output(label) for processes, label in runs]
    splits = [re.search(r"(\d+) micro-batches of (\d+) lines", output).groups() for output in outputs]
    assert splits == [("1", "32"), ("8", "4"), ("1", "16"), ("4", "4")]
    reference = numbers(r"loss ([\d.]+) over", outputs[0])
    assert len(reference) == 3
    for output in outputs[1:]:
        assert numbers(r"loss [\d.]+ over (\d+) tokens", output) == numbers(
            r"loss [\d.]+ over (\d+) tokens", outputs[0]
        )
        assert numbers(r"loss ([\d.]+) over", output) == pytest.approx(reference, abs=2e-5)
    for processes in (1, 2):
        wrong = numbers(r"loss ([\d.]+) over", ran(processes).output("micro_batches"))
        assert max(abs(a - b) for a, b in zip(wrong, reference, strict=True)) > 2e-3


@pytest.mark.long
def test_checkpointing_goes_on_after_a_kill_amid_an_epoch_as_if_there_had_been_none(python, launch, tmp_path):
    script = [str(EXAMPLES / "checkpointing.py"), "--epochs", "3"]
    whole = finish([*python, *script, "--output-dir", "whole"], tmp_path)
    interrupted = [*launch(2), *script, "--output-dir", "parts"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(interrupted, cwd=tmp_path, env=ENVIRON, start_new_session=True, **pipes)
    deadline = time.monotonic() + 100
    for line in process.stdout:
        assert time.monotonic() < deadline
        if "saving checkpoint_4" in line:  # in the second epoch, after 20 of 22 batches
            break
    os.killpg(process.pid, 9)
    process.communicate(timeout=30)
    rest = finish([*python, *interrupted[len(launch(2)) :]], tmp_path)  # one process now
    assert re.search(
        "resumed in epoch 2 after [12]0 batches", rest
    )  # 10 if checkpoint_4 was not yet on the disk
    losses = dict(re.findall(r"epoch (\d): mean loss ([\d.]+)", whole))
    resumed = dict(re.findall(r"epoch (\d): mean loss ([\d.]+)", rest))
    assert list(resumed) == ["2", "3"]
    # The interrupted epoch; what two processes round otherwise than one grows with the steps after it.
    assert float(resumed["2"]) == pytest.approx(float(losses["2"]), rel=1e-4)
    assert float(resumed["3"]) == pytest.approx(float(losses["3"]), rel=2e-3)
    assert accuracy(rest) == pytest.approx(accuracy(whole), abs=1 / 359)
    assert len(list((tmp_path / "parts" / "checkpoints").glob("checkpoint_*"))) == 2
    nothing_left = finish(interrupted, tmp_path)
    assert "resumed in epoch 4 after 0 batches" in nothing_left
    assert accuracy(nothing_left) == accuracy(rest)
