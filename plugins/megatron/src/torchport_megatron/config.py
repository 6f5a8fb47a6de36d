"""Settings of the strategy `megatron`. Imports no torch: the command line reads them for `--help`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torchport.config.kwargs import KwargsHandler
from torchport.config.schema import setting
from torchport.errors import ConfigurationError

STYLES = ("constant", "linear", "cosine", "inverse-square-root")

_REFUSED: Mapping[str, str] = {
    "pipeline_model_parallel_split_rank": "Megatron-Core no longer splits encoder and decoder over pipeline stages",
    "num_layers_per_virtual_pipeline_stage": "interleaved pipeline schedules are not supported yet",
    "megatron_dataset_flag": "Megatron's indexed data sets are not supported yet; prepare ordinary loaders",
    "tensorboard_dir": "metrics go to trackers: Accelerator(log_with='tensorboard', project_dir=...)",
    "set_all_logging_options": "metrics go to trackers: Accelerator(log_with=...)",
    "no_wd_decay_cond": "weight decay by parameter is not supported yet",
    "scale_lr_cond": "learning rates by parameter are not supported yet",
    "custom_prepare_model_function": "models are prepared by Megatron-Core; give custom_model_provider_function",
    "custom_megatron_datasets_provider_function": "Megatron's indexed data sets are not supported yet",
}
"""Documented settings that cannot be honoured, and why."""


@dataclass
class MegatronLMPlugin(KwargsHandler):
    """How a transformer is trained by Megatron-Core.

    Attributes:
        tp_degree: Processes over which each layer is spread.
        pp_degree: Processes over which the layers are spread.
        num_micro_batches: Micro-batches of a step, which the pipeline keeps under way at once.
        gradient_clipping: Largest norm of all gradients; 0 clips nothing.
        sequence_parallelism: Whether normalization and dropout are spread over the sequence too (`tp_degree` > 1).
        recompute_activations: Whether attention is computed again in backward instead of kept.
        use_distributed_optimizer: Whether optimizer states are spread over the data-parallel processes.
        pipeline_model_parallel_split_rank: Refused.
        num_layers_per_virtual_pipeline_stage: Refused.
        is_train_batch_min: Whether the micro-batch size is that of the loader with the smallest batches.
        train_iters: Optimizer steps of the training.
        train_samples: The same in samples.
        weight_decay_incr_style: How weight decay goes from `start_weight_decay` to `end_weight_decay`.
        start_weight_decay: Weight decay at the start; `None` takes the optimizer's.
        end_weight_decay: Weight decay at the end; `None` takes the optimizer's.
        lr_decay_style: How the learning rate falls to `min_lr`.
        lr_decay_iters: Steps until then; `None` takes `train_iters`.
        lr_decay_samples: The same in samples.
        lr_warmup_iters: Steps in which the learning rate rises.
        lr_warmup_samples: The same in samples.
        lr_warmup_fraction: The same as a part of the steps until `min_lr`.
        min_lr: Smallest learning rate.
        consumed_samples: Samples that were trained on before, for training, validation and test.
        no_wd_decay_cond: Refused.
        scale_lr_cond: Refused.
        lr_mult: Factor of the learning rate.
        megatron_dataset_flag: Refused.
        seq_length: Tokens of a sequence; `None` takes the model's positions.
        encoder_seq_length: The same for encoders.
        decoder_seq_length: The same for decoders.
        tensorboard_dir: Refused.
        set_all_logging_options: Refused.
        eval_iters: Batches of an evaluation, for scripts that ask.
        eval_interval: Steps between two evaluations, for scripts that ask.
        return_logits: Whether the result of a forward has logits too (GPT, last pipeline stage).
        custom_train_step_class: A subclass of `AbstractTrainStep`.
        custom_train_step_kwargs: Its further arguments.
        custom_model_provider_function: `function(pre_process, post_process, add_encoder, add_decoder)` that returns the
            model's part for a pipeline stage.
        custom_prepare_model_function: Refused.
        custom_megatron_datasets_provider_function: Refused.
        custom_get_batch_function: `function(data_iterator)` instead of the train step's.
        custom_loss_function: Instead of the train step's.
        other_megatron_args: Further fields of Megatron-Core's `TransformerConfig`, and `position_embedding_type`.

    Raises:
        ConfigurationError: for a setting that is refused, or a value that makes no sense.
    """

    __torchport_prefix__: ClassVar[str] = "megatron_lm"

    tp_degree: int = setting(1, help="Processes over which each layer is spread (tensor parallelism).")
    pp_degree: int = setting(1, help="Processes over which the layers are spread (pipeline parallelism).")
    num_micro_batches: int = setting(1, help="Micro-batches of a step.")
    gradient_clipping: float = setting(1.0, help="Largest norm of all gradients; 0 clips nothing.")
    sequence_parallelism: bool = setting(
        False, help="Spread normalization and dropout over the sequence too."
    )
    recompute_activations: bool = setting(False, help="Compute attention again in backward.")
    use_distributed_optimizer: bool = setting(
        False, help="Spread optimizer states over the data-parallel processes."
    )
    pipeline_model_parallel_split_rank: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    is_train_batch_min: bool = True
    train_iters: int | None = setting(None, help="Optimizer steps of the training.")
    train_samples: int | None = setting(None, help="Samples of the training.")
    weight_decay_incr_style: str = setting(
        "constant", help="How weight decay changes.", choices=("constant", "linear", "cosine")
    )
    start_weight_decay: float | None = setting(None, help="Weight decay at the start.")
    end_weight_decay: float | None = setting(None, help="Weight decay at the end.")
    lr_decay_style: str = setting("linear", help="How the learning rate falls.", choices=STYLES)
    lr_decay_iters: int | None = setting(None, help="Steps until the smallest learning rate.")
    lr_decay_samples: int | None = setting(None, help="Samples until the smallest learning rate.")
    lr_warmup_iters: int | None = setting(None, help="Steps in which the learning rate rises.")
    lr_warmup_samples: int | None = setting(None, help="Samples in which the learning rate rises.")
    lr_warmup_fraction: float | None = setting(
        None, help="Part of the steps in which the learning rate rises."
    )
    min_lr: float = setting(0.0, help="Smallest learning rate.")
    consumed_samples: list[int] | None = None
    no_wd_decay_cond: Callable[..., Any] | None = None
    scale_lr_cond: Callable[..., Any] | None = None
    lr_mult: float = setting(1.0, help="Factor of the learning rate.")
    megatron_dataset_flag: bool = False
    seq_length: int | None = setting(None, help="Tokens of a sequence.")
    encoder_seq_length: int | None = setting(None, help="Tokens of an encoder's sequence.")
    decoder_seq_length: int | None = setting(None, help="Tokens of a decoder's sequence.")
    tensorboard_dir: str | None = None
    set_all_logging_options: bool = False
    eval_iters: int = setting(100, help="Batches of an evaluation, for scripts that ask.")
    eval_interval: int = setting(1000, help="Steps between two evaluations, for scripts that ask.")
    return_logits: bool = setting(False, help="Return logits too (GPT, last pipeline stage).")
    custom_train_step_class: Any = None
    custom_train_step_kwargs: dict[str, Any] | None = None
    custom_model_provider_function: Callable[..., Any] | None = None
    custom_prepare_model_function: Callable[..., Any] | None = None
    custom_megatron_datasets_provider_function: Callable[..., Any] | None = None
    custom_get_batch_function: Callable[..., Any] | None = None
    custom_loss_function: Callable[..., Any] | None = None
    other_megatron_args: dict[str, Any] | None = None
    global_batch_size: int = field(default=0, init=False)
    """Samples of an optimizer step over all processes; known once a loader has been prepared."""

    def __post_init__(self) -> None:
        defaults = {item.name: item.default for item in fields(self)}
        for name, reason in _REFUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigurationError(
                    f"MegatronLMPlugin cannot honour {name}", reason=reason, hint=f"leave {name} out"
                )
        for name in ("tp_degree", "pp_degree", "num_micro_batches"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, defaults[name])
            elif value < 1:
                raise ConfigurationError(f"MegatronLMPlugin.{name} must be at least 1", found=str(value))
        for name in (
            "gradient_clipping", "sequence_parallelism", "recompute_activations", "use_distributed_optimizer",
        ):  # fmt: skip
            if getattr(self, name) is None:
                setattr(self, name, defaults[name])
        if self.lr_decay_style not in STYLES:
            raise ConfigurationError(
                f"MegatronLMPlugin.lr_decay_style must be one of {', '.join(STYLES)}",
                found=repr(self.lr_decay_style),
            )
