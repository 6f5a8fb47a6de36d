"""Train steps: from a micro-batch to what a model takes, and from its output to a loss.

Attention masks are `True` where nothing may be attended to, as Megatron-Core has them. Labels are those of
transformers: -100 stands for a token that no loss is about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

IGNORED = -100


def avg_losses_across_data_parallel_group(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the means of losses over the data-parallel processes, as one tensor of that many elements."""
    from megatron.core import parallel_state

    averaged = torch.cat([loss.clone().detach().view(1) for loss in losses])
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_reduce(averaged, group=group)
    return averaged / torch.distributed.get_world_size(group=group)


class AbstractTrainStep(ABC):
    """What a step of one kind of model needs.

    Args:
        name: Name of the kind.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def get_batch_func(self) -> Callable[..., Any]:
        """Return `function(data_iterator)`, which takes the next micro-batch and makes the model's inputs."""

    @abstractmethod
    def get_forward_step_func(self) -> Callable[..., Any]:
        """Return `function(data_iterator, model)`, which returns the output and the function of its loss."""

    @abstractmethod
    def get_loss_func(self) -> Callable[..., Any]:
        """Return the function of the loss, which returns it and what to report, by name."""


class _TrainStep(AbstractTrainStep):
    """The parts that all kinds share.

    Args:
        args: The plugin's settings (`MegatronLMPlugin`), or `None`.
        device: Where micro-batches are moved.
        **kwargs: Kept in `kwargs`, for subclasses.
    """

    kind = ""

    def __init__(self, args: Any = None, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(self.kind)
        self.args = args
        self.device = device
        self.kwargs = kwargs
        self.get_batch = getattr(args, "custom_get_batch_function", None) or self.get_batch_func()
        self.loss_func = getattr(args, "custom_loss_function", None) or self.get_loss_func()
        self.forward_step = self.get_forward_step_func()

    def read(self, data_iterator: Iterator[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Take the next micro-batch, on the device."""
        return {name: value.to(self.device) for name, value in next(data_iterator).items()}


class _TokenTrainStep(_TrainStep):
    """A step whose model gives a loss for each token."""

    def get_loss_func(self) -> Callable[..., Any]:
        """Return the mean over the tokens that have a label; the output is a loss for each token."""

        def loss_func(
            loss_mask: torch.Tensor, output_tensor: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, Any]]:
            loss = _masked_mean(output_tensor, loss_mask)
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}

        return loss_func


class GPTTrainStep(_TokenTrainStep):
    """Predicts each token from those before it (batches: `input_ids`, `attention_mask`, `labels`)."""

    kind = "gpt"

    def get_batch_func(self) -> Callable[..., Any]:
        """Return a function that gives tokens, labels, loss mask, attention mask and position ids.

        Each is of shape (micro-batch, sequence), the attention mask (micro-batch or 1, 1, sequence, sequence). A label
        is the token after its own, or that of `labels`.
        """

        def get_batch(data_iterator: Iterator[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
            batch = self.read(data_iterator)
            tokens = batch["input_ids"].long()
            real = batch.get("attention_mask")
            labels = batch.get("labels")
            if labels is None:
                labels = tokens if real is None else tokens.masked_fill(real == 0, IGNORED)
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
            loss_mask = (labels != IGNORED).float()
            mask = _causal(tokens.shape[1], tokens.device)
            if real is not None:
                mask = mask | (real == 0)[:, None, None, :]
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            return tokens, labels.clamp(min=0), loss_mask, mask, positions

        return get_batch

    def get_forward_step_func(self) -> Callable[..., Any]:
        """Return the forward of a micro-batch."""

        def forward_step(
            data_iterator: Iterator[Any], model: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            tokens, labels, loss_mask, attention_mask, position_ids = self.get_batch(data_iterator)
            if getattr(self.args, "return_logits", False):
                output = model(tokens, position_ids, attention_mask)
                return output, partial(self._loss_of_logits, labels, loss_mask)
            output = model(tokens, position_ids, attention_mask, labels=labels)
            return output, partial(self.loss_func, loss_mask)

        return forward_step

    def _loss_of_logits(
        self, labels: torch.Tensor, loss_mask: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Compute the loss of logits (micro-batch, sequence, share of the vocabulary), and report them."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        losses = vocab_parallel_cross_entropy(logits.to(torch.float32, copy=True), labels)  # in place
        loss, report = self.loss_func(loss_mask, losses)
        return loss, {**report, "logits": logits.detach()}


class BertTrainStep(_TrainStep):
    """Predicts masked tokens and whether the second sentence follows the first.

    Batches have `input_ids`, `attention_mask`, `token_type_ids`, `labels` and, if it is to be learned,
    `next_sentence_label`.
    """

    kind = "bert"

    def get_batch_func(self) -> Callable[..., Any]:
        """Return a function that gives tokens, types, sentence order (or `None`), loss mask, labels, padding mask."""

        def get_batch(data_iterator: Iterator[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor | None, ...]:
            batch = self.read(data_iterator)
            tokens = batch["input_ids"].long()
            padding = batch.get("attention_mask", torch.ones_like(tokens)).long()
            types = batch.get("token_type_ids", torch.zeros_like(tokens)).long()
            labels = batch["labels"].long()
            loss_mask = (labels != IGNORED).float()
            order = batch.get("next_sentence_label")
            return tokens, types, order, loss_mask, labels.clamp(min=0), padding

        return get_batch

    def get_loss_func(self) -> Callable[..., Any]:
        """Return the mean over masked tokens, and with sentence orders the sum of both losses."""

        def loss_func(
            loss_mask: torch.Tensor, sentence_order: torch.Tensor | None, output_tensor: Any
        ) -> tuple[torch.Tensor, dict[str, Any]]:
            losses, order_logits = output_tensor
            loss = masked = _masked_mean(losses, loss_mask)
            report = {"lm loss": avg_losses_across_data_parallel_group([masked])[0]}
            if sentence_order is not None:
                order = torch.nn.functional.cross_entropy(
                    order_logits.view(-1, 2).float(), sentence_order.long().view(-1)
                )
                report["sop loss"] = avg_losses_across_data_parallel_group([order])[0]
                loss = masked + order
            return loss, report

        return loss_func

    def get_forward_step_func(self) -> Callable[..., Any]:
        """Return the forward of a micro-batch."""

        def forward_step(
            data_iterator: Iterator[Any], model: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            tokens, types, order, loss_mask, labels, padding = self.get_batch(data_iterator)
            output = model(tokens, padding, tokentype_ids=types, lm_labels=labels)
            return output, partial(self.loss_func, loss_mask, order)

        return forward_step


class T5TrainStep(_TokenTrainStep):
    """Predicts a second sequence from a first (batches: `input_ids`, `attention_mask`, `labels`)."""

    kind = "t5"

    def get_batch_func(self) -> Callable[..., Any]:
        """Return a function that gives encoder and decoder tokens, loss mask, labels and three attention masks.

        Decoder tokens are the labels, one later, after the token that starts decoders. Masks are of shape
        (micro-batch, 1, queries, keys).
        """

        def get_batch(data_iterator: Iterator[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
            batch = self.read(data_iterator)
            tokens, labels = batch["input_ids"].long(), batch["labels"].long()
            real = batch.get("attention_mask", torch.ones_like(tokens)) != 0
            loss_mask = (labels != IGNORED).float()
            labels = labels.clamp(min=0)
            first = torch.full_like(labels[:, :1], int(self.kwargs.get("start_token", 0)))
            decoder = batch.get("decoder_input_ids", torch.cat([first, labels[:, :-1]], dim=1)).long()
            real_decoder = torch.ones_like(decoder, dtype=torch.bool)
            encoder_mask = ~(real[:, None, :, None] & real[:, None, None, :])
            decoder_mask = _causal(decoder.shape[1], decoder.device).expand(decoder.shape[0], -1, -1, -1)
            cross_mask = ~(real_decoder[:, None, :, None] & real[:, None, None, :])
            return tokens, decoder, loss_mask, labels, encoder_mask, decoder_mask, cross_mask

        return get_batch

    def get_forward_step_func(self) -> Callable[..., Any]:
        """Return the forward of a micro-batch."""

        def forward_step(
            data_iterator: Iterator[Any], model: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            tokens, decoder, loss_mask, labels, *masks = self.get_batch(data_iterator)
            output = model(tokens, decoder, *masks, lm_labels=labels)
            return output, partial(self.loss_func, loss_mask)

        return forward_step


STEPS: Mapping[str, type[_TrainStep]] = {
    step.kind: step for step in (GPTTrainStep, BertTrainStep, T5TrainStep)
}
"""The train step of each kind of model."""


def _masked_mean(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mask = mask.view(-1).float()
    return (losses.float().view(-1) * mask).sum() / mask.sum().clamp(min=1)


def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
