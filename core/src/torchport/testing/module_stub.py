"""A suite for backends made of `ModuleBackend` and `probe_module`, on a stub of the vendor's module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.distributed as dist

from torchport.errors import LaunchError
from torchport.plan.registry import load_reference
from torchport.plugin import BackendSpec, Capabilities, ModuleBackend, Probe, Topology
from torchport.plugin.requirements import name_of
from torchport.testing.checks import everything, forget
from torchport.testing.stubs import StubDevice, StubModule, installed


class ModuleStubConformance:
    """A backend over `torch.<device_type>`, against a stub made from its documentation; it has two devices.

    Attributes:
        backend: Name of the backend.
        documentation: The pages from which the stub is made.
        tool: The vendor's command that lists devices.
        process_group: What PyTorch is asked for to exchange tensors: `"cpu:gloo,acme:accl"`.
    """

    backend: ClassVar[str]
    documentation: ClassVar[tuple[str, ...]]
    tool: ClassVar[str]
    process_group: ClassVar[str]

    @pytest.fixture
    def spec(self) -> BackendSpec:
        """The backend's descriptor."""
        spec = everything().find("backend", self.backend, "the conformance kit").spec
        return cast("BackendSpec", spec)

    @pytest.fixture
    def package(self, spec: BackendSpec) -> str:
        """Name of the vendor's module."""
        backend: type[ModuleBackend] = load_reference(spec.factory)
        return backend.package

    @pytest.fixture
    def device(
        self, spec: BackendSpec, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[StubDevice]:
        """The stub, installed in place of the vendor's package."""
        monkeypatch.delenv(spec.visible_devices_env, raising=False)
        stub = StubDevice(spec.device_type, documentation=self.documentation, count=2)
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: stub)
        release = torch.__version__.split("+")[0]
        with installed(
            stub,
            StubModule(package, documentation=self.documentation),
            distributions={name_of(text) or text: release for text in spec.runtime},
        ):
            yield stub
        forget()

    @pytest.fixture
    def built(self, spec: BackendSpec, device: StubDevice) -> ModuleBackend:
        """The backend."""
        backend: ModuleBackend = load_reference(spec.factory)(spec)
        return backend

    def test_without_the_vendors_package_the_reason_says_what_to_install(self, spec: BackendSpec) -> None:
        """The reason is what the operator types."""
        forget()
        probe = everything().probe(spec)
        assert not probe.available
        for requirement in spec.runtime:
            assert f"pip install '{requirement}'" in probe.reason

    def test_the_probe_counts_without_initialising_and_says_why_there_is_none(
        self, spec: BackendSpec, package: str, device: StubDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A probe says how many devices there are, or what hides them, or that the package cannot be loaded."""
        probe, visible = load_reference(spec.probe), spec.visible_devices_env
        assert probe() == Probe(available=True, count=2)
        device.count = 0
        assert f"({self.tool})" in probe().reason
        monkeypatch.setenv(visible, "9")
        assert probe().reason == f"no device is visible with {visible}='9': unset it, or name one"
        assert not device.initialized
        monkeypatch.setitem(sys.modules, package, None)
        assert probe().reason.startswith(f"{package} cannot be loaded: ")

    def test_each_process_takes_the_device_of_its_local_rank(
        self, device: StubDevice, built: ModuleBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More processes than devices are refused."""
        monkeypatch.setattr(torch, "device", lambda kind, index: SimpleNamespace(type=kind, index=index))
        monkeypatch.setattr(device, "set_device", lambda one: setattr(device, "current", one.index))
        assert (built.device(1).index, device.current) == (1, 1)
        with pytest.raises(LaunchError, match="local rank 2 has no device of its own"):
            built.device(2)

    def test_memory_and_random_numbers_are_those_of_the_vendors_module(
        self, device: StubDevice, built: ModuleBackend
    ) -> None:
        """Figures and generators come from the module, for the device asked for."""
        one: Any = 1
        device.occupy(100, 1)
        assert built.memory_info(one) == (device.memory - 100, device.memory)
        assert built.max_memory_allocated(one) == 100
        built.seed(5)
        first: Any = 0
        state = built.rng_state(first)
        built.set_rng_state(state, first)
        assert device.arguments("manual_seed_all") == [(5,)]
        assert torch.equal(device.arguments("set_rng_state")[0][0], state)

    @pytest.mark.parametrize(("supported", "dtypes"), [(True, {"float16", "bfloat16"}), (False, {"float16"})])
    def test_bf16_is_declared_where_the_module_says_so(
        self,
        device: StubDevice,
        built: ModuleBackend,
        monkeypatch: pytest.MonkeyPatch,
        supported: bool,
        dtypes: set[str],
    ) -> None:
        """Everything else that PyTorch documents for such modules is declared."""
        monkeypatch.setattr(device, "is_bf16_supported", lambda: supported)
        assert built.capabilities() == Capabilities(
            autocast=frozenset(dtypes), grad_scaler=True, pinned_memory=True, streams=True, memory_stats=True
        )

    def test_tensors_go_over_the_vendors_collectives_and_objects_over_gloo(
        self, spec: BackendSpec, device: StubDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process group is opened with both."""
        opened: list[tuple[str, int]] = []
        monkeypatch.setattr(
            dist, "init_process_group", lambda backend, **kw: opened.append((backend, kw["rank"]))
        )
        collectives = everything().find("collectives", spec.collectives, "the conformance kit").spec
        placed: Any = SimpleNamespace(type=spec.device_type)
        load_reference(collectives.factory)(collectives).open(
            Topology(),
            placed,
            timedelta(seconds=1),
            dist.HashStore(),  # type: ignore[attr-defined]
        )
        assert opened == [(self.process_group, 0)]
