"""Flags, keys, variables and refusals."""

from __future__ import annotations

import pytest
import torchport_megatron
from torchport import utils
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Resolved
from torchport.config.plugins import apply_settings, plugin_settings
from torchport.errors import ConfigurationError, TorchportError, UnsupportedOperationError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import Topology, distributions
from torchport_megatron import MegatronLMDummyDataLoader, MegatronLMPlugin
from torchport_megatron.check import check

DOCUMENTED = {
    "tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2, "sequence_parallelism": True,
    "recompute_activations": True, "use_distributed_optimizer": True, "gradient_clipping": 1.0,
}  # fmt: skip
"""The flags of the reference's command line page, without `--megatron_lm_`, with values of its guide."""

CUDA = """
from torchport.plugin import BackendSpec, CollectivesSpec, Probe, hookimpl

@hookimpl
def torchport_collectives():
    yield CollectivesSpec(name="labccl", factory="torchport_cpu.gloo:GlooCollectives")

@hookimpl
def torchport_backends():
    yield BackendSpec(
        name="lab", device_type="cuda", factory="torchport_cudalab:make", probe="torchport_cudalab:probe",
        priority=-1, collectives="labccl",
    )

def probe():
    return Probe(available=True, count=8)

def make(spec, config=None):
    from torchport_cpu.backend import CpuBackend
    return CpuBackend(spec, config)
"""


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """Install a backend that says its devices are CUDA's, for plans that build nothing."""
    (tmp_path / "torchport_cudalab.py").write_text(CUDA)
    info = tmp_path / "torchport_cudalab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchport-cudalab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchport]\ncudalab = torchport_cudalab\n")
    monkeypatch.syspath_prepend(tmp_path)


def planned(processes=1, collectives=None, **arguments):
    topology = Topology(world_size=processes, local_world_size=processes)
    return plan(Request(arguments=arguments, asked_by="Accelerator"), {}, discover({}), topology)


def test_each_documented_flag_has_its_key_and_variable():
    settings = {item.flag: item for item in schema.settings_of(MegatronLMPlugin)}
    for name in DOCUMENTED:
        item = settings[f"megatron-lm-{name.replace('_', '-')}"]
        assert (item.yaml, item.env) == (f"megatron_lm_{name}", f"MEGATRON_LM_{name.upper()}")


def test_the_documented_section_of_a_file_is_read_back_from_variables():
    content = {f"megatron_lm_{name}": value for name, value in DOCUMENTED.items()}
    resolved = Resolved(LaunchConfig(), {}, {}, sections={"megatron_lm_config": content})
    environ = apply_settings(resolved, {}, plugin_settings(discover({}))[0]).environ
    assert schema.from_environment(MegatronLMPlugin, environ) == DOCUMENTED


def test_a_machine_without_cuda_is_refused_before_anything_is_built():
    with pytest.raises(TorchportError) as caught:
        planned(strategy=MegatronLMPlugin())
    assert "run on CUDA only, not on cpu" in caught.value.reason
    with pytest.raises(TorchportError, match="run on CUDA only"):
        planned(strategy="megatron_lm")


def test_without_megatron_core_the_error_says_what_to_install(monkeypatch):
    found = distributions.version_of
    monkeypatch.setattr(
        distributions, "version_of", lambda name: None if name == "megatron-core" else found(name)
    )
    with pytest.raises(TorchportError, match="megatron-core"):
        planned(strategy="megatron")


def test_processes_must_divide_into_models(cuda):
    made = planned(8, backend="lab", strategy=MegatronLMPlugin(tp_degree=2, pp_degree=2))
    assert (made.distributed_type, made.distributed) == ("MEGATRON_LM", True)
    with pytest.raises(TorchportError, match="must be a multiple of 4") as caught:
        planned(6, backend="lab", strategy=MegatronLMPlugin(tp_degree=2, pp_degree=2))
    assert caught.value.hint == "--num-processes 4"


def test_plans_of_other_strategies_are_left_alone():
    assert check(planned(strategy="single")) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_dataset_flag": True},
        {"tensorboard_dir": "x"},
        {"num_layers_per_virtual_pipeline_stage": 2},
        {"no_wd_decay_cond": print},
        {"tp_degree": 0},
        {"lr_decay_style": "jagged"},
    ],
)
def test_what_cannot_be_honoured_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        MegatronLMPlugin(**settings)


def test_indexed_data_sets_are_refused():
    with pytest.raises(UnsupportedOperationError, match="prepare an ordinary"):
        MegatronLMDummyDataLoader(data_path="x")


def test_every_public_name_can_be_imported():
    assert [name for name in torchport_megatron.__all__ if not hasattr(torchport_megatron, name)] == []


def test_the_documented_names_are_those_of_the_utilities():
    for name in torchport_megatron.__all__:
        assert getattr(utils, name) is getattr(torchport_megatron, name)
