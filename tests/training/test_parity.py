"""The same script gives the same losses as hand-written PyTorch, however it is started."""

import os
import sys
from pathlib import Path

import pytest
from torchport_cpu.mpi_probe import find_library
from torchport_cpu.mpirun import choose_program, find_programs, folders

pytestmark = pytest.mark.multiprocess
BIN = Path(sys.executable).parent
FP32 = ["fp32", "accumulate 3, odd remainder", "accumulate 3, clipped"]
HALF = ["bf16", "bf16, accumulate 3", "fp16", "fp16, accumulate 3, clipped"]


def mpirun(processes: int) -> list[str]:
    """The command that a user of the installed MPI library types."""
    library = find_library(os.environ)
    program = choose_program(find_programs(folders(os.environ, library)), library)
    if program.flavour == "openmpi":
        return [program.path, "--allow-run-as-root", "--oversubscribe", "-np", str(processes)]
    return [program.path, "-n", str(processes)]


@pytest.fixture(scope="module")
def one_process(run_worker, python):
    return run_worker(python, "parity.py")


@pytest.fixture(scope="module")
def two_processes(run_worker, launch):
    return run_worker(launch(2), "parity.py")


@pytest.fixture(scope="module", params=["mpirun", "launch --launcher mpirun", "torchrun"])
def other_ways(request, run_worker, prefork):
    """Start the fp32 cases of two processes in every other way."""
    if request.param == "mpirun":
        command = [*mpirun(2), sys.executable]
        return "mpi", run_worker(command, "parity.py", *FP32, environ={"TORCHPORT_COLLECTIVES": "mpi"})
    if request.param == "torchrun":
        return "gloo", run_worker([str(prefork / "torchrun"), "--nproc-per-node", "2"], "parity.py", *FP32)
    command = [str(BIN / "torchport"), "launch", "--num-processes", "2"]
    return "mpi", run_worker([*command, "--launcher", "mpirun", "--collectives", "mpi"], "parity.py", *FP32)


@pytest.mark.parametrize("case", FP32)
def test_one_process_gives_the_losses_of_hand_written_pytorch(one_process, case):
    assert one_process[0]["processes"] == 1
    assert one_process[0][case]["torchport"] == pytest.approx(one_process[0][case]["hand"], rel=1e-6)


@pytest.mark.parametrize("case", FP32)
def test_two_processes_give_the_losses_of_hand_written_ddp(two_processes, case):
    assert [result["processes"] for result in two_processes] == [2, 2]
    for result in two_processes:
        assert result[case]["torchport"] == pytest.approx(result[case]["hand"], rel=1e-6)
    assert two_processes[0][case]["torchport"] != two_processes[1][case]["torchport"]


@pytest.mark.parametrize("case", HALF)
def test_half_precision_equals_hand_written_autocast_exactly(one_process, two_processes, case):
    for result in (*one_process, *two_processes):
        assert result[case]["torchport"] == result[case]["hand"]


@pytest.mark.parametrize("case", FP32)
def test_every_way_to_start_two_processes_gives_the_same_losses(two_processes, other_ways, case):
    collectives, results = other_ways
    for expected, result in zip(two_processes, results, strict=True):
        assert result["plan"]["collectives"] == collectives
        assert result["processes"] == 2
        assert result[case]["torchport"] == pytest.approx(expected[case]["hand"], rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_item_weighs_the_same_over_processes_and_micro_batches(one_process, two_processes, reduction):
    for result in (*one_process, *two_processes):
        assert result["items"][reduction] == pytest.approx(result["items"]["expected"], rel=1e-6, abs=1e-7)
