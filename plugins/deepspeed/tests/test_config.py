"""Settings: where they may be given, and how they go together with DeepSpeed's own configuration."""

import base64
import json
import subprocess
import sys

import pytest
from torchport.config.schema import from_mapping, settings_of
from torchport.errors import ConfigurationError
from torchport_deepspeed import DeepSpeedPlugin
from torchport_deepspeed.ds_config import get, places

DOCUMENTED_VARIABLES = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "hf_ds_config": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}


def test_documented_variables_are_derived_from_the_settings():
    variables = {item.name: item.env for item in settings_of(DeepSpeedPlugin)}
    assert {name: variables[name] for name in DOCUMENTED_VARIABLES} == DOCUMENTED_VARIABLES


def test_the_documented_section_is_read():
    section = {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    }
    plugin = DeepSpeedPlugin(**from_mapping(DeepSpeedPlugin, section, "a file"))
    assert plugin.deepspeed_config == {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    assert plugin.is_zero3_init_enabled()


def test_defaults_are_stage_2_and_what_the_script_says():
    assert DeepSpeedPlugin().deepspeed_config == {
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": False},
    }


def test_an_argument_comes_before_a_variable_and_that_before_the_default(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    plugin = DeepSpeedPlugin(zero_stage=1)
    assert (plugin.zero_stage, plugin.gradient_clipping) == (1, 0.5)


FILE = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": False,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    },
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 10,
}


def test_a_file_a_dict_and_base64_are_the_same_configuration(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILE))
    encoded = base64.urlsafe_b64encode(json.dumps(FILE).encode()).decode()
    read = [
        DeepSpeedPlugin(hf_ds_config=source).deepspeed_config for source in (FILE, str(path), path, encoded)
    ]
    assert read[0] == read[1] == read[2] == read[3]
    assert read[0]["gradient_accumulation_steps"] == 10


def test_all_settings_that_disagree_with_the_file_are_named_at_once():
    with pytest.raises(ConfigurationError) as caught:
        DeepSpeedPlugin(
            hf_ds_config=FILE,
            gradient_accumulation_steps=1,
            gradient_clipping=1.0,
            offload_optimizer_device="cpu",
            offload_param_device="cpu",
            zero3_save_16bit_model=True,
            zero_stage=3,
        )
    named = [line.split(":")[0].strip() for line in caught.value.found.splitlines()[1:]]
    assert named == [
        "gradient_accumulation_steps",
        "offload_optimizer_device",
        "offload_param_device",
        "zero3_save_16bit_model",
    ]


def test_settings_take_the_place_of_auto():
    file = {
        "zero_optimization": {
            "stage": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
        },
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }
    plugin = DeepSpeedPlugin(
        hf_ds_config=file,
        zero_stage=3,
        gradient_accumulation_steps=5,
        gradient_clipping=1.0,
        offload_param_device="cpu",
        offload_optimizer_device="cpu",
        zero3_save_16bit_model=True,
    )
    assert list(places(plugin.deepspeed_config, "auto")) == ["train_batch_size"]
    assert get(plugin.deepspeed_config, "zero_optimization.offload_param.device") == "cpu"
    assert file["zero_optimization"]["stage"] == "auto"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"zero_stage": 2, "offload_param_device": "cpu"}, "offload_param to 'cpu' needs ZeRO stage 3"),
        (
            {"zero_stage": 2, "offload_optimizer_device": "nvme"},
            "offload_optimizer to 'nvme' needs ZeRO stage 3",
        ),
        ({"zero_stage": 3, "offload_param_device": "nvme"}, "needs a folder: offload_param_nvme_path"),
        ({"zero_stage": 4}, "must be one of 0, 1, 2, 3"),
        ({"zero_stage": 3, "offload_param_device": "gpu"}, "must be one of none, cpu, nvme"),
        ({"gradient_clipping": "often"}, "a number, or 'auto'"),
        ({"gradient_accumulation_steps": 0}, "must be at least 1"),
        ({"enable_msamp": True}, "no longer maintained"),
        ({"hf_ds_config": "missing.json"}, "there is no such file"),
        ({"hf_ds_config": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}}, "both are true"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_said(settings, problem):
    with pytest.raises(ConfigurationError, match="(?s).*" + problem.replace("(", r"\(")):
        DeepSpeedPlugin(**settings)


def test_json_with_a_trailing_comma_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2,}}')
    with pytest.raises(ConfigurationError, match="no comma before a closing bracket"):
        DeepSpeedPlugin(hf_ds_config=path)


def test_settings_are_read_without_torch():
    code = (
        "import sys; from torchport_deepspeed import DeepSpeedPlugin; DeepSpeedPlugin(zero_stage=3);"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
