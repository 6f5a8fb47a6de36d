"""What can be told of the plugin without its runtimes: descriptors, probes, settings, places, helpers."""

from __future__ import annotations

import dataclasses
import sys
from datetime import timedelta

import pytest
import torch
import torchport_tpu
from torchport.config import layers
from torchport.config.file import read_layer
from torchport.config.plugins import apply_settings, plugin_settings
from torchport.errors import ConfigurationError, LaunchError
from torchport.plan.discovery import discover
from torchport.plugin import Job, LauncherSpec, Probe, Topology
from torchport.testing.stubs import StubModule, installed
from torchport_tpu import chips, launcher
from torchport_tpu.config import XlaPlugin
from torchport_tpu.install import requirements
from torchport_tpu.spmd_config import SpmdPlugin

PAGES = ("https://pypi.org/project/torch-tpu/0.2.0/",)
POD = {"TPU_WORKER_HOSTNAMES": "t0, t1,t2", "TPU_WORKER_ID": "1"}


@pytest.fixture
def pci(tmp_path, monkeypatch):
    """Attach devices to a PCI bus of the test's own."""
    monkeypatch.setattr(chips, "PCI_DEVICES", str(tmp_path))
    for name in ("PJRT_DEVICE", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "CPU_NUM_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def attach(*devices: tuple[str, str]) -> None:
        for number, (vendor, device) in enumerate(devices):
            folder = tmp_path / f"0000:00:{number:02x}.0"
            folder.mkdir()
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "device").write_text(f"{device}\n")

    return attach


def backends() -> dict:
    return {spec.name: spec for spec in torchport_tpu.torchport_backends()}


# --- which runtime ---


def test_tpu_is_the_newer_runtime_where_both_are_installed():
    with installed(distributions={"torch-tpu": "0.2.0", "torch-xla": "2.9.0"}):
        specs = backends()
    assert (specs["tpu"].device_type, specs["xla"].device_type) == ("tpu", "xla")
    assert specs["tpu"].runtime == ("torch-tpu>=0.2",)
    assert specs["tpu"].priority > specs["xla"].priority


def test_tpu_is_torch_xla_where_that_alone_is_installed():
    with installed(distributions={"torch-xla": "2.9.0"}):
        spec = backends()["tpu"]
    assert (spec.device_type, spec.collectives, spec.runtime) == ("xla", "xla", ("torch-xla>=2.6",))


def test_without_a_runtime_each_backend_says_what_to_install():
    found = discover({"TORCHPORT_PLUGINS": "tpu"})
    reasons = {spec.name: found.probe(spec).reason for spec in found.specs("backend")}
    assert "pip install 'torch-tpu>=0.2'" in reasons["tpu"]
    assert "pip install 'torch-xla>=2.6'" in reasons["xla"]


# --- which device ---


def test_chips_are_counted_on_the_pci_bus(pci, monkeypatch):
    pci(("0x8086", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0xffff"))
    expected = Probe(available=True, count=2, details={"chips": "TPU v5e"})
    assert chips.probe_tpu_over_xla() == chips.probe_xla() == expected
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "1")
    assert chips.probe_tpu_over_xla().count == 1


def test_no_chip_is_a_reason_and_so_is_another_device(pci, monkeypatch):
    pci()
    assert "no TPU chip is attached" in chips.probe_tpu_over_xla().reason
    assert "set PJRT_DEVICE, such as PJRT_DEVICE=CPU" in chips.probe_xla().reason
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    assert "the backend 'xla' works on it" in chips.probe_tpu_over_xla().reason
    assert chips.probe_xla() == Probe(
        available=True, count=1, details={"PJRT_DEVICE": "CPU", "virtual devices": "4"}
    )


def test_torch_tpu_without_a_chip_says_so_and_does_not_ask_the_runtime(pci):
    from torchport_tpu import native

    pci()
    assert "is this a TPU virtual machine?" in native.probe().reason
    pci(("0x1ae0", "0x006f"))
    assert native.probe().reason.startswith("TPU v6e is there, and PyTorch's accelerator is None")


# --- torch_tpu, against a stub of its documented module ---


@pytest.fixture
def native(monkeypatch):
    """The backend on a stub of `torch.tpu`, whose functions that `torch.accelerator` has too must not be called."""
    from torchport_tpu.native import TpuBackend

    generator = torch.Generator()
    stub = StubModule(
        "torch.tpu",
        documentation=PAGES,
        default_generators=(generator,),
        manual_seed_all=generator.manual_seed,
    )
    asked: list[tuple] = []
    for name, value in (("current_device_index", 0), ("device_count", 4), ("synchronize", None)):
        monkeypatch.setattr(
            torch.accelerator,
            name,
            lambda *args, name=name, value=value: (asked.append((name, *args)), value)[1],
        )
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: stub)
    with installed(distributions={"torch-tpu": "0.2.0"}):
        yield TpuBackend(backends()["tpu"]), stub, asked


def test_torch_tpu_is_asked_through_torch_accelerator(native):
    backend, stub, asked = native
    assert backend.count() == 4
    backend.synchronize(torch.device("cpu"))
    assert asked == [("device_count",), ("synchronize", torch.device("cpu"))]
    assert backend.capabilities().autocast == {"bfloat16"}
    assert (backend.compile_backend(), backend.stream(torch.device("cpu"))) == ("tpu", None)
    assert stub.calls == []


def test_random_states_of_torch_tpu_are_those_of_its_default_generators(native):
    backend, stub, _ = native
    host = torch.device("cpu")
    backend.seed(5)
    state = backend.rng_state(host)
    first = torch.rand(3, generator=stub.default_generators[0])
    backend.set_rng_state(state, host)
    assert torch.equal(torch.rand(3, generator=stub.default_generators[0]), first)
    assert stub.arguments("manual_seed_all") == [(5,)]


def test_processes_of_torch_tpu_that_nobody_connected_are_refused(native, monkeypatch):
    backend, _, _ = native
    monkeypatch.delenv("TORCH_TPU_SLICEBUILDER_ADDRESSES", raising=False)
    backend.start_process(Topology())
    with pytest.raises(LaunchError, match="--launcher xla"):
        backend.start_process(Topology(world_size=4, local_world_size=4, source="local"))
    monkeypatch.setenv("TORCH_TPU_SLICEBUILDER_ADDRESSES", "localhost:1,localhost:2")
    backend.start_process(Topology(world_size=2, local_world_size=2))


def test_tensors_of_torch_tpu_go_over_tpu_dist_and_objects_over_gloo(native, monkeypatch):
    from torchport_tpu.native import TpuCollectives

    opened: list[tuple] = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **kw: opened.append((backend, kw["rank"]))
    )
    spec = next(s for s in torchport_tpu.torchport_collectives() if s.name == "tpu_dist")
    device = dataclasses.make_dataclass("Device", ["type"])("tpu")
    TpuCollectives(spec).open(Topology(), device, timedelta(seconds=1), torch.distributed.HashStore())
    assert opened == [("cpu:gloo,tpu:tpu_dist", 0)]


# --- the place in a pod, and how processes start ---


def test_a_machine_of_a_pod_finds_its_place():
    assert launcher.pod(POD) == Topology(
        rank=1,
        world_size=3,
        node_rank=1,
        num_nodes=3,
        master_addr="t0",
        master_port=29500,
        source="TPU_WORKER_HOSTNAMES",
    )
    assert launcher.pod({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    with pytest.raises(ValueError, match="3 names, and TPU_WORKER_ID is '3'"):
        launcher.pod({**POD, "TPU_WORKER_ID": "3"})


@pytest.fixture
def launched(monkeypatch):
    """What the launcher would become: its command and environment."""
    made: list[tuple] = []

    class Replaced(Exception):
        pass

    def replace_process(command, environ):
        made.append((command, environ))
        raise Replaced

    monkeypatch.setattr(launcher, "replace_process", replace_process)
    for name in POD:
        monkeypatch.delenv(name, raising=False)

    def launch(**settings) -> tuple:
        job = Job(**{"command": (sys.executable, "train.py", "--lr", "1"), "environ": {}, **settings})
        xla = launcher.XlaLauncher(LauncherSpec(name="xla", factory="torchport_tpu.launcher:XlaLauncher"))
        with pytest.raises(Replaced):
            xla.launch(job)
        return made.pop()

    return launch


def test_torch_xla_starts_the_processes_of_a_machine(launched):
    command, environ = launched(environ={"A": "1"}, num_processes=4)
    assert command == (sys.executable, "-m", "torchport_tpu.spawn", "4", "train.py", "--lr", "1")
    assert environ == {"A": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_spmd_runs_the_script_once_on_each_machine(launched):
    command, environ = launched(environ={"TORCHPORT_STRATEGY": "spmd", **POD})
    assert command == (sys.executable, "train.py", "--lr", "1")
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "t0",
    }


# --- settings and helpers ---


def test_the_documented_variable_flag_and_key_ask_for_the_downcast(tmp_path):
    plugins, broken = plugin_settings(discover({"TORCHPORT_PLUGINS": "tpu"}))
    assert not broken

    def environ(text: str, **flags: str) -> dict:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        layer = read_layer(str(path))
        resolved = dataclasses.replace(layers.resolve(layers.Layer(), {}), sections=layer.sections)
        return apply_settings(resolved, flags, plugins).environ

    assert environ("downcast_bf16: 'yes'\n")["ACCELERATE_DOWNCAST_BF16"] == "True"
    assert "ACCELERATE_DOWNCAST_BF16" not in environ("downcast_bf16: 'no'\n")
    assert environ("", **{"downcast-bf16": "true"})["ACCELERATE_DOWNCAST_BF16"] == "True"
    assert environ("spmd_config:\n  spmd_sharding: data\n")["SPMD_SHARDING"] == "data"
    assert XlaPlugin() == XlaPlugin(downcast_bf16=False)
    assert SpmdPlugin().sharding == "fsdp"


def test_without_the_plugin_the_downcast_is_not_ignored(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("downcast_bf16: 'yes'\n")
    resolved = dataclasses.replace(
        layers.resolve(layers.Layer(), {}), sections=read_layer(str(path)).sections
    )
    with pytest.raises(ConfigurationError, match="pip install torchport-tpu"):
        apply_settings(resolved, {}, [])


def test_install_xla_takes_the_release_of_the_installed_pytorch():
    assert requirements(False, "2.8.1+cpu") == ("torch_xla==2.8.*",)
    assert requirements(True, "2.13.0") == ("torch==2.9.*", "torch_xla==2.9.*")
    with pytest.raises(ConfigurationError, match=r"torchport-tpu\[torch-tpu\]"):
        requirements(False, "2.13.0+cpu")


def test_install_xla_is_where_the_documentation_has_it():
    from torchport import utils

    assert utils.install_xla is torchport_tpu.install_xla


def test_spmd_sets_up_each_process_before_its_device_is_opened():
    (spec,) = torchport_tpu.torchport_strategies()
    assert spec.start_process == "torchport_tpu.spmd:start_process"
