"""Attention in a ring: keys and values are handed on from process to process, one part at a time.

Softmax is taken over one part after the other, with the running logarithm of the sum of exponentials; see "Ring
Attention with Blockwise Transformers for Near-Infinite Context" (arXiv:2310.01889). The work is done in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from torchport_fsdp.exchanges import hand_on


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: ProcessGroup,
    *,
    scale: float,
    positions: list[torch.Tensor] | None,
) -> torch.Tensor:
    """Return the attention of this process's queries over the keys and values of all processes.

    Args:
        query: Shape `(..., heads, length, width)`.
        key: Shape `(..., key heads, length, width)`; the number of heads is a multiple of that of key heads.
        value: Shape `(..., key heads, length, value width)`.
        group: The processes.
        scale: Factor of the products of queries and keys.
        positions: For causal attention, the places in the whole sequence that each process has, in order.
    """
    heads, key_heads = query.size(-3), key.size(-3)
    shape = (*query.shape[:-3], key_heads, heads // key_heads, *query.shape[-2:])
    grouped = query.reshape(shape)
    keys, values = key.unsqueeze(-3), value.unsqueeze(-3)
    result: torch.Tensor = _Ring.apply(grouped, keys, values, group, scale, positions)  # type: ignore[no-untyped-call]
    return result.flatten(-4, -3)


def _hidden(group: ProcessGroup, source: int, positions: list[torch.Tensor] | None) -> torch.Tensor | None:
    """Return which keys of a process come after which queries of this one; `None` where all are seen."""
    if positions is None:
        return None
    return positions[source][None, :] > positions[group.rank()][:, None]


def _apart(parts: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of what holds both side by side."""
    return parts[..., :width], parts[..., width:]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group: ProcessGroup,
        scale: float,
        positions: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        size, rank = group.size(), group.rank()
        queries = query.float()
        total = queries.new_full(query.shape[:-1], float("-inf"))
        output = queries.new_zeros((*query.shape[:-1], value.size(-1)))
        parts = torch.cat([key, value], dim=-1)
        for step in range(size):
            keys, values = _apart(parts.float(), key.size(-1))
            hidden = _hidden(group, (rank - step) % size, positions)
            if hidden is None or not bool(hidden.all()):
                scores = queries @ keys.transpose(-1, -2) * scale
                if hidden is not None:
                    scores = scores.masked_fill(hidden, float("-inf"))
                before, total = total, torch.logaddexp(total, torch.logsumexp(scores, dim=-1))
                seen = total.masked_fill(total == float("-inf"), 0.0).unsqueeze(-1)
                output = output * torch.exp(before.unsqueeze(-1) - seen) + torch.exp(scores - seen) @ values
            if step < size - 1:
                parts = hand_on(parts, group)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.group, ctx.scale, ctx.positions = group, scale, positions
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, output, total = ctx.saved_tensors
        group, scale = ctx.group, ctx.scale
        size, rank = group.size(), group.rank()
        gradient, queries = gradients[0].float(), query.float()
        delta = (gradient * output).sum(-1, keepdim=True)
        of_query = torch.zeros_like(queries)
        parts = torch.cat([key, value], dim=-1)
        of_parts = torch.zeros_like(parts, dtype=torch.float32)
        for step in range(size):
            keys, values = _apart(parts.float(), key.size(-1))
            hidden = _hidden(group, (rank - step) % size, ctx.positions)
            if hidden is None or not bool(hidden.all()):
                scores = queries @ keys.transpose(-1, -2) * scale
                if hidden is not None:
                    scores = scores.masked_fill(hidden, float("-inf"))
                weights = torch.exp(scores - total.unsqueeze(-1))
                of_scores = weights * (gradient @ values.transpose(-1, -2) - delta) * scale
                of_query += of_scores @ keys
                of_keys = (of_scores.transpose(-1, -2) @ queries).sum(-3, keepdim=True)
                of_values = (weights.transpose(-1, -2) @ gradient).sum(-3, keepdim=True)
                of_parts += torch.cat([of_keys, of_values], dim=-1)
            if step < size - 1:
                parts = hand_on(parts, group)
            of_parts = hand_on(of_parts, group)  # after the last step they are where they belong
        of_key, of_value = _apart(of_parts, key.size(-1))
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None
