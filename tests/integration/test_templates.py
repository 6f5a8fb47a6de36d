"""The configuration files that Accelerate's documentation offers launch a script on processors.

What a file asks for that is not here (GPUs, machines, an engine of 8 bits that needs CUDA) is overridden by flags.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.plugins]
FILES = Path(__file__).parents[1] / "fixtures" / "accelerate"
TEMPLATES = FILES / "config_yaml_templates"
STAGES = {path.stem: path for path in sorted((FILES / "deepspeed_config_templates").glob("*.json"))}


@pytest.fixture(scope="module")
def launch(prefork):
    """Launch the script as a template says, and return what each rank wrote, in order of rank."""

    def run(name: str, folder: Path, *flags: str, files: tuple[Path, ...] = ()) -> list[dict]:
        command = [str(prefork / "torchport"), "launch", "--config_file", f"{name}.yaml", *flags]
        done = subprocess.run(
            [*command, str(FILES / "train.py"), str(folder), *map(str, files)],
            cwd=TEMPLATES,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]

    return run


ONE_MACHINE = ("--cpu", "--num_machines", "1", "--num_processes", "2", "--main_process_ip", "127.0.0.1")


@pytest.mark.parametrize(
    ("name", "flags", "plan", "processes"),
    [
        ("single_gpu", (), ["single", "bf16"], 1),
        ("fp8", ("--fp8_backend", "AO", "--fp8_format", "HYBRID"), ["single", "fp8"], 1),
        ("multi_gpu", ("--cpu",), ["ddp", "bf16"], 2),
        ("multi_node", ONE_MACHINE, ["ddp", "no"], 2),
        ("fsdp", (), ["fsdp", "bf16"], 2),
    ],
)
def test_a_template_launches_a_script_that_trains(launch, tmp_path, name, flags, plan, processes):
    ranks = launch(name, tmp_path, *flags)
    assert [rank["rank"] for rank in ranks] == list(range(processes))
    for rank in ranks:
        assert (rank["plan"], rank["processes"], rank["learns"]) == (plan, processes, True)


@pytest.fixture(scope="module")
def deepspeed(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    for path in STAGES.values():
        file = json.loads(path.read_text())
        file["fp16"]["enabled"] = "auto"
        (folder / path.name).write_text(json.dumps(file))
    return launch("deepspeed", folder, files=tuple(STAGES.values()))


def trained_or_refused(found: dict, stage: int) -> None:
    """The templates ask for fp16, which DeepSpeed has on few processors."""
    if "refused" in found:
        assert "DeepSpeed has no fp16 on this processor" in found["refused"]
        assert 'fp16.enabled: "auto"' in found["refused"]
    else:
        assert (found["plan"], found["stage"]) == (["deepspeed", "fp16"], stage)


def test_the_template_of_deepspeed_finds_its_file_beside_it(deepspeed):
    for rank in deepspeed:
        trained_or_refused(rank["launched"], 1)


@pytest.mark.parametrize("name", STAGES)
def test_a_configuration_file_of_deepspeed_trains_in_a_precision_that_is_here(deepspeed, name):
    assert len(STAGES) == 5
    stage = int(name.removeprefix("zero_stage")[0])
    for rank in deepspeed:
        trained_or_refused(rank[name]["as it is"], stage)
        found = rank[name]["auto"]
        assert (found["plan"], found["stage"], found["learns"]) == (["deepspeed", "no"], stage, True)
