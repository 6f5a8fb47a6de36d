"""Configurations, models, batches and losses, against the installed Megatron-Core; no device here trains with it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchport.errors import ConfigurationError
from torchport.plugin import Topology
from torchport_megatron import (
    BertTrainStep,
    GPTTrainStep,
    MegatronLMDummyScheduler,
    MegatronLMPlugin,
    T5TrainStep,
    avg_losses_across_data_parallel_group,
)
from torchport_megatron import mapping as m

GPT = SimpleNamespace(
    model_type="gpt2", n_layer=2, n_embd=32, n_head=4, n_inner=None, n_positions=16, vocab_size=100,
    layer_norm_epsilon=1e-5, resid_pdrop=0.1, attn_pdrop=0.2, activation_function="gelu_new",
)  # fmt: skip
BERT = SimpleNamespace(
    model_type="megatron-bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=16, vocab_size=100, layer_norm_eps=1e-12, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, hidden_act="gelu", type_vocab_size=2,
)  # fmt: skip
T5 = SimpleNamespace(
    model_type="t5", num_layers=2, num_decoder_layers=3, d_model=32, num_heads=4, d_ff=64, d_kv=8, n_positions=16,
    vocab_size=100, layer_norm_epsilon=1e-6, dropout_rate=0.0, dense_act_fn="relu", decoder_start_token_id=7,
)  # fmt: skip
CPU = MegatronLMPlugin(other_megatron_args={"use_cpu_initialization": True})


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Open a process group of one, and Megatron-Core's groups in it."""
    from megatron.core import parallel_state

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_settings_reach_the_transformer():
    plugin = MegatronLMPlugin(
        tp_degree=2, pp_degree=2, sequence_parallelism=True, recompute_activations=True,
        other_megatron_args={"attention_head_type": "multiquery", "rotary_interleaved": True},
    )  # fmt: skip
    config = m.transformer_config(m.shape_of(GPT), dataclasses.replace(plugin), torch.bfloat16)
    assert (config.num_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 4)
    assert (config.ffn_hidden_size, config.kv_channels) == (128, 8)
    assert (config.hidden_dropout, config.attention_dropout, config.layernorm_epsilon) == (0.1, 0.2, 1e-5)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 2)
    assert (config.sequence_parallel, config.recompute_granularity) == (True, "selective")
    assert (config.bf16, config.fp16, config.params_dtype) == (True, False, torch.bfloat16)
    assert (config.num_query_groups, config.rotary_interleaved) == (1, True)
    values = torch.randn(8)
    assert torch.equal(config.activation_func(values), torch.nn.functional.gelu(values, approximate="tanh"))


def test_sequence_parallelism_needs_tensor_parallelism():
    config = m.transformer_config(m.shape_of(GPT), MegatronLMPlugin(sequence_parallelism=True), None)
    assert (config.sequence_parallel, config.params_dtype) == (False, torch.float32)


def test_settings_and_the_scripts_optimizer_reach_the_optimizer():
    plugin = MegatronLMPlugin(gradient_clipping=0.5, use_distributed_optimizer=True, min_lr=1e-5, lr_mult=2.0)
    weights = [torch.nn.Parameter(torch.zeros(2))]
    adam = torch.optim.AdamW(weights, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    config = m.optimizer_config(adam, plugin, torch.float16)
    assert (config.optimizer, config.lr, config.min_lr, config.weight_decay) == ("adam", 0.02, 1e-5, 0.3)
    assert (config.adam_beta1, config.adam_beta2, config.adam_eps) == (0.8, 0.9, 1e-6)
    assert (config.decoupled_weight_decay, config.clip_grad, config.fp16) == (True, 0.5, True)
    assert config.use_distributed_optimizer
    sgd = m.optimizer_config(torch.optim.SGD(weights, lr=1.0, momentum=0.7), plugin, None)
    assert (sgd.optimizer, sgd.sgd_momentum, sgd.bf16) == ("sgd", 0.7, False)
    assert not m.optimizer_config(torch.optim.Adam(weights), plugin, None).decoupled_weight_decay
    with pytest.raises(ConfigurationError, match="the optimizer Rprop"):
        m.optimizer_config(torch.optim.Rprop(weights), plugin, None)


def test_gradients_of_16_bit_parameters_are_added_up_in_float32():
    plugin = MegatronLMPlugin(use_distributed_optimizer=True)
    assert m.data_parallel_config(plugin, torch.bfloat16).grad_reduce_in_fp32
    assert not m.data_parallel_config(plugin, None).grad_reduce_in_fp32
    assert m.data_parallel_config(plugin, None).use_distributed_optimizer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (20, 200, "linear")),  # what the script's scheduler says
        ({"train_iters": 50}, (20, 500, "linear")),
        ({"lr_decay_iters": 30, "lr_warmup_iters": 5, "lr_decay_style": "cosine"}, (50, 300, "cosine")),
        ({"train_samples": 400, "lr_warmup_fraction": 0.25}, (100, 400, "linear")),
        ({"lr_decay_samples": 80, "lr_warmup_samples": 8}, (8, 80, "linear")),
    ],
)
def test_steps_of_the_schedule_are_counted_in_samples(settings, expected):
    weights = [torch.nn.Parameter(torch.zeros(2))]
    plugin = MegatronLMPlugin(start_weight_decay=0.0, end_weight_decay=0.2, **settings)
    config = m.optimizer_config(torch.optim.AdamW(weights, lr=0.01), plugin, None)
    made = m.schedule(plugin, config, total=20, warmup=2, batch=10)
    assert (made["lr_warmup_steps"], made["lr_decay_steps"], made["lr_decay_style"]) == expected
    assert (made["max_lr"], made["start_wd"], made["end_wd"]) == (0.01, 0.0, 0.2)


def test_megatrons_scheduler_takes_the_arguments_and_warms_up_linearly():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.01)
    plugin = MegatronLMPlugin()
    arguments = m.schedule(plugin, m.optimizer_config(optimizer, plugin, None), total=4, warmup=2, batch=10)
    placeholder = MegatronLMDummyScheduler(optimizer, total_num_steps=4, warmup_num_steps=2)
    placeholder.scheduler = OptimizerParamScheduler(optimizer, **arguments)
    rates = []
    for _ in range(5):
        rates += placeholder.get_last_lr()
        placeholder.step()  # does nothing by itself
        placeholder.scheduler.step(increment=10)
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005, 0.0])
    assert placeholder.state_dict()["num_steps"] == 50


def test_vocabularies_are_padded_for_the_processes():
    shape = m.shape_of(GPT)
    assert m.padded_vocabulary(shape, MegatronLMPlugin()) == 128
    assert m.padded_vocabulary(shape, MegatronLMPlugin(tp_degree=4)) == 512


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.shape_of(SimpleNamespace(model_type="vit")), "a model of type 'vit'"),
        (lambda: m.shape_of(torch.nn.Linear(1, 1)), "a Linear without model_type"),
        (lambda: m.transformer_config(m.shape_of(T5), MegatronLMPlugin(pp_degree=2), None), "and a T5 model"),
        (
            lambda: m.transformer_config(
                m.shape_of(GPT), MegatronLMPlugin(other_megatron_args={"vocab_file": "x"}), None
            ),
            "other_megatron_args has 'vocab_file'",
        ),
        (
            lambda: m.position_embedding(MegatronLMPlugin(other_megatron_args={"position_embedding_type": "alibi"})),
            "position_embedding_type 'alibi'",
        ),
        (
            lambda: m.transformer_config(dataclasses.replace(m.shape_of(GPT), activation="mish"), CPU, None),
            "the activation 'mish'",
        ),
    ],
)  # fmt: skip
def test_what_megatron_core_does_not_have_is_refused(call, message):
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert message in str(caught.value)


def layer(hidden: int, ffn: int, cross: bool = False) -> int:
    """Parameters of a transformer layer with biases and two (or three) normalizations."""
    attention = 4 * hidden * hidden + 4 * hidden + 2 * hidden
    return attention * (2 if cross else 1) + 2 * hidden * ffn + ffn + hidden + 2 * hidden


def test_models_of_the_three_kinds_have_the_right_number_of_parameters(groups):
    from torchport_megatron.models import make_model

    def count(config, **kwargs):
        return sum(p.numel() for p in make_model(m.shape_of(config), CPU, None, **kwargs).parameters())

    embeddings, norm = 128 * 32 + 16 * 32, 2 * 32
    assert count(GPT) == embeddings + 2 * layer(32, 128) + norm
    assert count(GPT, last=False) == embeddings + 2 * layer(32, 128)
    head = 32 * 32 + 32 + norm + 128  # dense, its normalization, a bias for each token
    pooler, order = 32 * 32 + 32, 32 * 2 + 2
    assert count(BERT) == embeddings + 2 * 32 + 2 * layer(32, 64) + norm + head + pooler + order
    stacks = 2 * layer(32, 64) + 3 * layer(
        32, 64, cross=True
    )  # Megatron-Core's have no normalization at the end
    assert count(T5) == embeddings + stacks + 128


def test_a_model_of_ones_own_is_taken(groups):
    from torchport_megatron.models import make_model

    own = MegatronLMPlugin(custom_model_provider_function=lambda *stages: stages)
    assert make_model(m.shape_of(GPT), own, None, last=False) == (True, False, True, True)


TOKENS = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
LOGITS = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(1))


def token_losses(labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(LOGITS.transpose(1, 2), labels, reduction="none")


def test_gpt_predicts_the_next_token_and_no_padding(groups):
    seen = {}

    def model(tokens, positions, mask, labels):
        seen.update(tokens=tokens, positions=positions, mask=mask)
        return token_losses(labels)

    labels = TOKENS.masked_fill(PADDED == 0, -100)
    batch = {"input_ids": TOKENS, "attention_mask": PADDED, "labels": labels}
    output, loss_func = GPTTrainStep(CPU).forward_step(iter([batch]), model)
    loss, report = loss_func(output)
    expected = cross_entropy(LOGITS[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert report["lm loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(seen["tokens"], TOKENS)
    assert seen["positions"][1].tolist() == [0, 1, 2, 3, 4, 5]
    assert seen["mask"].shape == (2, 1, 6, 6)
    assert seen["mask"][1, 0, 3].tolist() == [False] * 4 + [True] * 2
    without = {"input_ids": TOKENS, "attention_mask": PADDED}
    output, loss_func = GPTTrainStep(CPU).forward_step(iter([without]), model)
    assert loss_func(output)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_gpt_reports_logits_where_they_are_asked_for(groups):
    step = GPTTrainStep(MegatronLMPlugin(return_logits=True))
    output, loss_func = step.forward_step(iter([{"input_ids": TOKENS}]), lambda *inputs: LOGITS.clone())
    loss, report = loss_func(output)
    expected = cross_entropy(LOGITS[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(report["logits"], LOGITS)


@pytest.mark.parametrize("with_order", [False, True])
def test_bert_predicts_masked_tokens_and_the_order_of_sentences(groups, with_order):
    labels = TOKENS.masked_fill(torch.arange(6) % 3 != 0, -100)
    batch = {"input_ids": TOKENS, "attention_mask": PADDED, "labels": labels}
    order_logits, order = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([1, 1])
    if with_order:
        batch["next_sentence_label"] = order

    def model(tokens, padding, tokentype_ids, lm_labels):
        assert torch.equal(padding, PADDED)
        assert tokentype_ids.sum() == 0
        return token_losses(lm_labels), order_logits

    output, loss_func = BertTrainStep(CPU).forward_step(iter([batch]), model)
    loss, report = loss_func(output)
    expected = cross_entropy(LOGITS.flatten(0, 1), labels.flatten())
    total = expected + (cross_entropy(order_logits, order) if with_order else 0)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert set(report) == ({"lm loss", "sop loss"} if with_order else {"lm loss"})


def test_t5_predicts_the_second_sequence_from_the_first(groups):
    labels = TOKENS.flip(1).masked_fill(torch.arange(6) > 4, -100)
    seen = {}

    def model(tokens, decoder, encoder_mask, decoder_mask, cross_mask, lm_labels):
        seen.update(decoder=decoder, masks=(encoder_mask, decoder_mask, cross_mask))
        return token_losses(lm_labels)

    batch = {"input_ids": TOKENS, "attention_mask": PADDED, "labels": labels}
    output, loss_func = T5TrainStep(CPU, start_token=7).forward_step(iter([batch]), model)
    loss, _ = loss_func(output)
    assert loss.item() == pytest.approx(
        cross_entropy(LOGITS.flatten(0, 1), labels.flatten()).item(), rel=1e-6
    )
    assert seen["decoder"][0].tolist() == [7, *TOKENS[0].flip(0)[:5].tolist()]
    assert [mask.shape for mask in seen["masks"]] == [(2, 1, 6, 6)] * 3
    encoder, decoder, cross = (mask[1, 0] for mask in seen["masks"])
    assert encoder[0].tolist() == cross[0].tolist() == [False] * 4 + [True] * 2
    assert decoder[2].tolist() == [False] * 3 + [True] * 3


def test_a_step_of_ones_own_replaces_parts(groups):
    class Weighted(GPTTrainStep):
        def get_loss_func(self):
            def loss_func(loss_mask, output):
                return output.sum() * self.kwargs["alpha"], {}

            return loss_func

    step = Weighted(CPU, alpha=0.5)
    output, loss_func = step.forward_step(iter([{"input_ids": TOKENS}]), lambda *a, labels: torch.ones(2, 6))
    assert loss_func(output)[0].item() == 6.0
    own = MegatronLMPlugin(custom_get_batch_function=lambda iterator: next(iterator))
    assert GPTTrainStep(own).get_batch(iter(["mine"])) == "mine"


def test_losses_are_averaged_over_data_parallel_processes(groups):
    averaged = avg_losses_across_data_parallel_group([torch.tensor(1.0), torch.tensor(3.0)])
    assert averaged.tolist() == [1.0, 3.0]


def test_processes_of_one_model_read_the_same_batches():
    from torchport.plan.discovery import discover
    from torchport_megatron.strategy import MegatronStrategy

    spec = discover({}).find("strategy", "megatron", "the test").spec
    strategy = MegatronStrategy(spec, MegatronLMPlugin(tp_degree=2, pp_degree=2))
    shares = [
        strategy.data_share(Topology(rank=rank, world_size=8, local_rank=rank, local_world_size=8))
        for rank in range(8)
    ]
    assert shares == [(0, 2), (0, 2), (1, 2), (1, 2)] * 2  # Megatron-Core's order: tensor, data, pipeline
