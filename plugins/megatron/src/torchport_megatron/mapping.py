"""From the plugin's settings and a model's configuration to the configurations of Megatron-Core."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from torchport.errors import ConfigurationError

from torchport_megatron.config import MegatronLMPlugin

VOCABULARY_MULTIPLE = 128
"""The padded vocabulary of each tensor-parallel process is a multiple of this."""

_POSITIONS = {"absolute": "learned_absolute", "rotary": "rope"}
_ACTIVATIONS: Mapping[str, Callable[..., Any]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_new": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a model is made of, whatever its own configuration calls it.

    Attributes:
        kind: `"gpt"`, `"bert"` or `"t5"`.
        layers: Layers (of the encoder).
        decoder_layers: Layers of the decoder; 0 without one.
        hidden: Size of the hidden states.
        heads: Attention heads.
        ffn: Size inside the feed-forward part.
        kv_channels: Size of an attention head.
        positions: Longest sequence, in tokens.
        vocabulary: Tokens.
        epsilon: Added to variances in normalization.
        hidden_dropout: Probability.
        attention_dropout: Probability.
        activation: Name of the activation.
        gated: Whether the feed-forward part is gated.
        tokentypes: Kinds of segments (BERT).
        tied: Whether the output layer shares the embedding's weight.
        start_token: First token of a decoder.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    kv_channels: int
    positions: int
    vocabulary: int
    epsilon: float
    hidden_dropout: float
    attention_dropout: float
    activation: str
    decoder_layers: int = 0
    gated: bool = False
    tokentypes: int = 0
    tied: bool = True
    start_token: int = 0


def shape_of(config: Any) -> Shape:
    """Read the configuration of a transformers model: GPT-2, Megatron-BERT, T5 or mT5.

    Args:
        config: An object with `model_type` and the attributes of that type.

    Raises:
        ConfigurationError: for another type.
    """
    kind = getattr(config, "model_type", None)
    if kind == "gpt2":
        return Shape(
            kind="gpt", layers=config.n_layer, hidden=config.n_embd, heads=config.n_head,
            ffn=getattr(config, "n_inner", None) or 4 * config.n_embd, kv_channels=config.n_embd // config.n_head,
            positions=config.n_positions, vocabulary=config.vocab_size, epsilon=config.layer_norm_epsilon,
            hidden_dropout=config.resid_pdrop, attention_dropout=config.attn_pdrop,
            activation=config.activation_function, tied=getattr(config, "tie_word_embeddings", True),
        )  # fmt: skip
    if kind == "megatron-bert":
        return Shape(
            kind="bert", layers=config.num_hidden_layers, hidden=config.hidden_size,
            heads=config.num_attention_heads, ffn=config.intermediate_size,
            kv_channels=config.hidden_size // config.num_attention_heads,
            positions=config.max_position_embeddings, vocabulary=config.vocab_size,
            epsilon=config.layer_norm_eps, hidden_dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob, activation=config.hidden_act,
            tokentypes=config.type_vocab_size, tied=getattr(config, "tie_word_embeddings", True),
        )  # fmt: skip
    if kind in ("t5", "mt5"):
        return Shape(
            kind="t5", layers=config.num_layers, decoder_layers=config.num_decoder_layers or config.num_layers,
            hidden=config.d_model, heads=config.num_heads, ffn=config.d_ff, kv_channels=config.d_kv,
            positions=getattr(config, "n_positions", 512), vocabulary=config.vocab_size,
            epsilon=config.layer_norm_epsilon, hidden_dropout=config.dropout_rate,
            attention_dropout=config.dropout_rate, activation=config.dense_act_fn,
            gated=getattr(config, "is_gated_act", False), tied=getattr(config, "tie_word_embeddings", True),
            start_token=getattr(config, "decoder_start_token_id", None) or 0,
        )  # fmt: skip
    raise ConfigurationError(
        "the strategy 'megatron' makes its model from the configuration of a transformers model",
        found=f"a model of type {kind!r}" if kind else f"a {type(config).__name__} without model_type",
        reason="Megatron-Core's models that are supported are those of GPT-2, Megatron-BERT, T5 and mT5",
        hint="MegatronLMPlugin(custom_model_provider_function=...), or another strategy",
    )


def padded_vocabulary(shape: Shape, plugin: MegatronLMPlugin) -> int:
    """Return the size of the vocabulary that can be divided over the tensor-parallel processes."""
    multiple = VOCABULARY_MULTIPLE * plugin.tp_degree
    return -(-shape.vocabulary // multiple) * multiple


def sequence_length(shape: Shape, plugin: MegatronLMPlugin) -> int:
    """Return the longest sequence of the (first) stack of layers, in tokens."""
    asked = plugin.seq_length or (plugin.encoder_seq_length if shape.kind != "gpt" else None)
    return asked or shape.positions


def position_embedding(plugin: MegatronLMPlugin) -> str:
    """Return Megatron-Core's name of the position embedding."""
    asked: str = (plugin.other_megatron_args or {}).get("position_embedding_type", "absolute")
    if asked == "alibi":
        raise ConfigurationError(
            "MegatronLMPlugin: position_embedding_type 'alibi'",
            reason="Megatron-Core has no such embedding",
            hint="'absolute' or 'rotary'",
        )
    return _POSITIONS.get(asked, asked)


def transformer_config(
    shape: Shape, plugin: MegatronLMPlugin, dtype: torch.dtype | None, *, decoder: bool = False
) -> TransformerConfig:
    """Return the configuration of a stack of layers.

    Args:
        shape: The model.
        plugin: The settings.
        dtype: The dtype of parameters: `torch.bfloat16`, `torch.float16`, or `None` for float32.
        decoder: Whether it is the second stack (T5).

    Raises:
        ConfigurationError: for an entry of `other_megatron_args` that Megatron-Core does not have.
    """
    if shape.kind == "t5" and plugin.pp_degree > 1:
        raise ConfigurationError(
            f"the strategy 'megatron' with pp_degree {plugin.pp_degree} and a T5 model",
            reason="Megatron-Core no longer splits encoder and decoder over pipeline stages",
            hint="pp_degree=1 and a larger tp_degree",
        )
    if shape.activation not in _ACTIVATIONS:
        raise ConfigurationError(
            f"the strategy 'megatron' with the activation {shape.activation!r}",
            found=", ".join(_ACTIVATIONS),
            hint="MegatronLMPlugin(custom_model_provider_function=...)",
        )
    return TransformerConfig(
        num_layers=shape.decoder_layers if decoder else shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        kv_channels=shape.kv_channels,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        layernorm_epsilon=shape.epsilon,
        activation_func=_ACTIVATIONS[shape.activation],
        gated_linear_unit=shape.gated,
        tensor_model_parallel_size=plugin.tp_degree,
        pipeline_model_parallel_size=plugin.pp_degree,
        sequence_parallel=plugin.sequence_parallelism and plugin.tp_degree > 1,
        recompute_granularity="selective" if plugin.recompute_activations else None,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype or torch.float32,
        pipeline_dtype=dtype or torch.float32,
        **_further(plugin),
    )


def _further(plugin: MegatronLMPlugin) -> dict[str, Any]:
    """Return `other_megatron_args` as fields of `TransformerConfig`."""
    known = {item.name for item in dataclasses.fields(TransformerConfig)}
    further: dict[str, Any] = {}
    for name, value in (plugin.other_megatron_args or {}).items():
        if name == "attention_head_type":
            further["num_query_groups"] = 1 if value == "multiquery" else None
        elif name in known:
            further[name] = value
        elif name != "position_embedding_type":
            raise ConfigurationError(
                f"MegatronLMPlugin: other_megatron_args has {name!r}",
                reason="the TransformerConfig of the installed Megatron-Core has no such field",
                hint="leave it out, or make the model yourself: custom_model_provider_function",
            )
    return further


def optimizer_config(
    optimizer: torch.optim.Optimizer, plugin: MegatronLMPlugin, dtype: torch.dtype | None
) -> OptimizerConfig:
    """Return the configuration of Megatron-Core's optimizer that goes on for PyTorch's.

    Args:
        optimizer: Adam, AdamW or SGD; its first group of parameters says learning rate, betas and so on.
        plugin: The settings.
        dtype: The dtype of parameters.

    Raises:
        ConfigurationError: for another kind of optimizer.
    """
    group = optimizer.param_groups[0]
    common = {
        "lr": group["lr"] * plugin.lr_mult, "min_lr": plugin.min_lr, "weight_decay": group.get("weight_decay", 0.0),
        "clip_grad": plugin.gradient_clipping, "use_distributed_optimizer": plugin.use_distributed_optimizer,
        "bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16, "params_dtype": dtype or torch.float32,
    }  # fmt: skip
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        first, second = group["betas"]
        return OptimizerConfig(
            optimizer="adam", adam_beta1=first, adam_beta2=second, adam_eps=group["eps"],
            decoupled_weight_decay=decoupled, **common,
        )  # fmt: skip
    if isinstance(optimizer, torch.optim.SGD):
        return OptimizerConfig(optimizer="sgd", sgd_momentum=group["momentum"], **common)
    raise ConfigurationError(
        f"the strategy 'megatron' with the optimizer {type(optimizer).__name__}",
        reason="Megatron-Core has Adam, AdamW and SGD of its own",
        hint="torch.optim.AdamW(model.parameters(), ...)",
    )


def data_parallel_config(
    plugin: MegatronLMPlugin, dtype: torch.dtype | None
) -> DistributedDataParallelConfig:
    """Return how gradients are averaged; those of 16-bit parameters are added up in float32."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=plugin.use_distributed_optimizer, grad_reduce_in_fp32=dtype is not None
    )


def schedule(
    plugin: MegatronLMPlugin, config: OptimizerConfig, total: int | None, warmup: int, batch: int
) -> dict[str, Any]:
    """Return the arguments of Megatron-Core's `OptimizerParamScheduler`, counted in samples.

    Args:
        plugin: The settings.
        config: The optimizer's configuration.
        total: Optimizer steps until the smallest learning rate, as the script's scheduler says.
        warmup: Optimizer steps in which the learning rate rises, as it says.
        batch: Samples of a step over all processes.
    """
    steps = plugin.lr_decay_iters or plugin.train_iters or total
    decay = plugin.lr_decay_samples or plugin.train_samples or (steps or 1) * batch
    rise = plugin.lr_warmup_samples or (plugin.lr_warmup_iters or warmup) * batch
    if plugin.lr_warmup_fraction is not None:
        rise = int(plugin.lr_warmup_fraction * decay)
    constant = steps is None and not (plugin.lr_decay_samples or plugin.train_samples)
    own = config.weight_decay
    return {
        "init_lr": 0.0, "max_lr": config.lr, "min_lr": plugin.min_lr, "lr_warmup_steps": min(rise, decay - 1),
        "lr_decay_steps": decay, "lr_decay_style": "constant" if constant else plugin.lr_decay_style,
        "start_wd": own if plugin.start_weight_decay is None else plugin.start_weight_decay,
        "end_wd": own if plugin.end_weight_decay is None else plugin.end_weight_decay,
        "wd_incr_steps": decay, "wd_incr_style": plugin.weight_decay_incr_style,
    }  # fmt: skip
