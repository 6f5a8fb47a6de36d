"""Configuration files with "auto", several engines, large models, and what is refused; in two processes."""

import pytest

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def job(run_job):
    return run_job("settings.py", environ={"TORCHPORT_DEEPSPEED_SAVE_TIMEOUT": "3"})


@pytest.fixture(scope="module")
def found(job):
    return job[1][0]


def test_auto_values_are_worked_out_from_what_is_prepared(found):
    assert found["described"]["config"] == {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 33 * 33},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.04, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": 0.04,
                "warmup_num_steps": 4,
                "total_num_steps": 8,
                "warmup_type": "linear",
            },
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
    }
    assert found["described"]["optimizer"] == "AdamW"


def test_the_engine_steps_its_scheduler_once_for_each_window(found):
    assert found["described"]["rates"] == [0, 0, 0, 0, 0, 0.01]


def test_what_auto_stood_for_is_reported_once_in_one_block(job):
    begin = job[0].index('torchport: what "auto" stands for in its configuration')
    block = job[0][begin:].splitlines()[1:20]
    lines = [" ".join(line.removeprefix("[rank0]:").split()) for line in block]
    assert "train_batch_size 24 (4 x 3 steps x 2 processes)" in lines
    assert "zero_optimization.reduce_bucket_size 1089 (hidden_size²)" in lines
    assert "zero_optimization.stage3_max_live_parameters - (DeepSpeed's default)" in lines
    assert "scheduler.params.warmup_num_steps 4 (DummyScheduler, / 2)" in lines
    assert job[0].count("train_batch_size") == 1


def test_all_auto_values_that_cannot_be_worked_out_are_named_at_once(found):
    assert found["without_width"].splitlines()[2:5] == [
        "    scheduler.params.total_num_steps: DummyScheduler(total_num_steps=...) does not say",
        "    zero_optimization.reduce_bucket_size: the model has neither config.hidden_size nor"
        " config.hidden_sizes",
        "    zero_optimization.stage3_prefetch_bucket_size: the model has neither config.hidden_size nor"
        " config.hidden_sizes",
    ]


def test_an_optimizer_of_the_script_and_one_of_the_file_are_refused(found):
    assert (
        "the configuration has an optimizer, and the script makes one: use DummyOptim"
        in found["two_optimizers"]
    )


def test_fp16_is_refused_where_deepspeed_has_none(found):
    assert "asks for the precision 'fp16', with the strategy 'deepspeed'" in found["half_precision"]
    assert "DeepSpeed has no fp16 on this processor" in found["half_precision"]


def test_the_file_decides_the_precision_unless_another_is_asked_for(found):
    assert found["precision_of_the_file"] == "bf16"
    assert (
        "'bf16', and the DeepSpeed configuration has bf16.enabled: false" in found["precisions_that_disagree"]
    )


def test_a_student_is_trained_with_one_plugin_and_its_teacher_partitioned_with_another(found):
    several = found["several"]
    assert [several[name] for name in ("first", "second", "kept", "learns")] == [True] * 4
    assert several["partitioned"] == [0, 0, 0, 0]


def test_each_accelerator_trains_one_engine(found):
    assert found["several"]["own"] == 6
    assert "hint" not in found["several"]["refused"]
    assert "a second Accelerator()" in found["several"]["refused"]


def test_large_models_are_constructed_partitioned(found):
    large = found["large"]
    assert large["held"] == [0] * 6
    assert (large["enabled"], large["inside"]) == (True, False)
    assert large["leaf"] is True
    assert large["losses"] == 6
    assert large["whole"]["1.inner.weight"] == [16, 16]


@pytest.mark.parametrize("what", ["weights", "checkpoint"])
def test_a_save_on_one_process_is_an_error_that_names_the_others(found, what):
    assert "takes every process, and 1 of 2 did not come" in found["saved_alone"][what]
    assert "rank 1 did not call it within 3 s" in found["saved_alone"][what]


def test_all_processes_save_after_one_has_tried_alone(found):
    assert found["saved_alone"]["then"] == ["together"]


def test_two_norms_to_clip_to_are_refused(found):
    assert found["clipped_otherwise"].startswith("clip_grad_norm_(..., 0.5), and gradient_clipping: 1.0")


def test_uneven_batches_are_refused(found):
    assert found["uneven"].startswith("join_uneven_inputs() with the strategy 'deepspeed'")


def test_offload_to_disk_trains_or_says_what_is_missing(found):
    if isinstance(found["on_disk"], str):
        assert "DeepSpeed's asynchronous file access (async_io) cannot be built here" in found["on_disk"]
        assert "apt-get install libaio-dev" in found["on_disk"]
    else:
        assert len(found["on_disk"]) == 6
