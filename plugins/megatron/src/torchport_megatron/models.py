"""Megatron-Core's models of the three kinds, for a pipeline stage."""

from __future__ import annotations

from typing import Any

import torch

from torchport_megatron.config import MegatronLMPlugin
from torchport_megatron.mapping import (
    Shape,
    padded_vocabulary,
    position_embedding,
    sequence_length,
    transformer_config,
)


def make_model(
    shape: Shape,
    plugin: MegatronLMPlugin,
    dtype: torch.dtype | None,
    *,
    first: bool = True,
    last: bool = True,
) -> Any:
    """Make the part of a model that one pipeline stage holds, with random weights.

    Args:
        shape: The model.
        plugin: The settings.
        dtype: The dtype of parameters; `None` for float32.
        first: Whether the stage has the embeddings.
        last: Whether the stage has the output layer.
    """
    if plugin.custom_model_provider_function is not None:
        return plugin.custom_model_provider_function(first, last, True, True)
    config = transformer_config(shape, plugin, dtype)
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": padded_vocabulary(shape, plugin),
        "max_sequence_length": max(sequence_length(shape, plugin), shape.positions),
        "pre_process": first,
        "post_process": last,
        "parallel_output": True,
        "share_embeddings_and_output_weights": shape.tied,
        "position_embedding_type": position_embedding(plugin),
    }
    if shape.kind == "gpt":
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        return GPTModel(transformer_layer_spec=get_gpt_layer_local_spec(), **common)
    if shape.kind == "bert":
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel

        return BertModel(
            num_tokentypes=shape.tokentypes,
            transformer_layer_spec=bert_layer_local_spec,
            add_binary_head=True,
            **common,
        )
    from megatron.core.models.T5 import T5Model
    from megatron.core.models.T5.t5_spec import (
        get_t5_decoder_with_local_block_spec,
        get_t5_encoder_with_local_block_spec,
    )

    common["config"] = transformer_config(shape, plugin, dtype, decoder=True)
    return T5Model(
        encoder_config=config,
        transformer_encoder_layer_spec=get_t5_encoder_with_local_block_spec(shape.layers),
        transformer_decoder_layer_spec=get_t5_decoder_with_local_block_spec(shape.decoder_layers),
        **common,
    )
