"""Several machines, restarts and torchrun: what the elastic agent does for `torchport launch`."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.multiprocess

ADDRESSES = ("10.77.0.1", "10.77.0.2")

ENTER = """
import os, sys
from pyroute2 import netns
netns.setns(sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", "torchport", "launch", *sys.argv[2:]])
"""


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable: as far as TCP can tell, two machines."""
    from pyroute2 import IPRoute, NetNS, netns

    tag = uuid.uuid4().hex[:6]
    names = (f"machine0-{tag}", f"machine1-{tag}")
    made = []
    try:
        try:
            for name in names:
                netns.create(name)
                made.append(name)
            with IPRoute() as network:
                network.link("add", ifname=f"a{tag}", kind="veth", peer=f"b{tag}")
                for cable, name in ((f"a{tag}", names[0]), (f"b{tag}", names[1])):
                    network.link("set", index=network.link_lookup(ifname=cable)[0], net_ns_fd=name)
        except Exception as error:
            if os.geteuid() == 0 and not isinstance(error, OSError):
                raise
            pytest.skip(f"this machine does not permit network namespaces: {error!r}")
        for cable, name, address in (
            (f"a{tag}", names[0], ADDRESSES[0]),
            (f"b{tag}", names[1], ADDRESSES[1]),
        ):
            with NetNS(name) as inside:
                index = inside.link_lookup(ifname=cable)[0]
                inside.addr("add", index=index, address=address, prefixlen=24)
                inside.link("set", index=index, state="up")
                inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
        yield names
    finally:
        for name in made:
            netns.remove(name)  # the cable goes with it


def test_two_machines_train_together(launches, machines):
    """The host name leads to the loopback interface in both, as on many machines: nothing has to be set for that."""
    launches.write("reduce.py", """
        import os
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([10.0 ** dist.get_rank()])
        dist.all_reduce(total)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        line = " ".join(os.environ[name] for name in names) + f" {int(total.item())}\\n"
        os.write(1, line.encode())  # at once: the agent passes the streams of all ranks on as they are
        dist.destroy_process_group()
    """)  # fmt: skip
    running = [
        launches.start(
            machine, "--num-machines", "2", "--machine-rank", str(rank), "--num-processes", "4",
            "--main-process-ip", ADDRESSES[0], "--main-process-port", "29511", "reduce.py",
            command=(sys.executable, "-c", ENTER),
        )
        for rank, machine in enumerate(machines)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert sorted(outputs[0][0].splitlines()) == ["0 4 0 2 0 1111", "1 4 1 2 0 1111"]
    assert sorted(outputs[1][0].splitlines()) == ["2 4 0 2 1 1111", "3 4 1 2 1 1111"]


def test_a_job_with_restarts_is_started_again(launches):
    launches.write("flaky.py", """
        import os, pathlib, sys
        first = not pathlib.Path("tried" + os.environ["RANK"]).exists()
        pathlib.Path("tried" + os.environ["RANK"]).touch()
        if first:
            sys.exit(1)
        print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
    """)  # fmt: skip
    finished = launches.run("--num-processes", "1", "--max-restarts", "3", "flaky.py")
    assert (finished.returncode, finished.stdout) == (0, "attempt 1\n"), finished.stderr


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "torchport", "launch", "--num-processes", "2", "--no-log-prefix"),
        (sys.executable, "-m", "torchport", "launch", "--num-processes", "2", "--launcher", "torchrun"),
        (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    ],
    ids=["local", "torchrun through launch", "torchrun"],
)
def test_a_script_finds_its_place_however_it_was_started(launches, command):
    launches.write("place.py", """
        import os
        from torchport.plan.discovery import discover
        from torchport.plan.topology import detect_topology
        place = detect_topology(os.environ, discover(os.environ))
        place = (place.rank, place.world_size, place.local_rank, place.local_world_size, place.source)
        os.write(1, (" ".join(map(str, place)) + "\\n").encode())
    """)  # fmt: skip
    finished = launches.run("place.py", command=command)
    source = "local" if "--no-log-prefix" in command else "torchrun"
    assert finished.lines == [f"0 2 0 2 {source}", f"1 2 1 2 {source}"], finished.stderr


def test_a_script_started_by_python_alone_is_one_process(launches):
    launches.write("place.py", """
        import os
        from torchport.plan.discovery import discover
        from torchport.plan.topology import detect_topology
        print(detect_topology(os.environ, discover(os.environ)).source)
    """)  # fmt: skip
    assert launches.run("place.py", command=(sys.executable,)).stdout == "no launcher\n"
