"""Documented older spellings and what they stand for: the only file of the core that may name a vendor.

Everything here is a table from a spelling to a slot and a value; no code of the core decides by these names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

DISTRIBUTED_TYPES = (
    "NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU",
    "MULTI_HPU", "DEEPSPEED", "FSDP", "TP", "XLA", "MEGATRON_LM",
)  # fmt: skip
"""The documented members of `DistributedType`, which exist whether or not their plugin is installed."""

KEYWORD_SLOTS = {
    "mixed_precision": "precision",
    "deepspeed_plugin": "strategy",
    "deepspeed_plugins": "strategy",
    "fsdp_plugin": "strategy",
    "megatron_lm_plugin": "strategy",
    "torch_tp_plugin": "strategy",
    "log_with": "trackers",
}
"""Documented keyword arguments of `Accelerator` that fill a slot with their value."""

KEYWORD_FLAGS = {"cpu": ("backend", "cpu")}
"""Documented keyword arguments that, when true, fill a slot with a fixed value."""

KEYWORD_HANDLERS = ("dynamo_plugin",)
"""Documented keyword arguments whose value is one more handler."""


class Keywords(NamedTuple):
    """Keyword arguments resolved to slots and handlers."""

    slots: dict[str, Any]
    handlers: tuple[Any, ...]


def resolve_keywords(keywords: Mapping[str, Any], slots: Mapping[str, Any], known: tuple[str, ...] = ()) -> Keywords:
    """Resolve older keyword arguments.

    Args:
        keywords: Arguments that are not slots themselves.
        slots: Values already given by slot; `None` means not given.
        known: Further names for the did-you-mean of an unknown argument.

    Raises:
        TypeError: for an unknown argument, or two that fill one slot differently.
    """
    filled = {slot: value for slot, value in slots.items() if value is not None}
    spelled = {slot: slot for slot in filled}
    handlers = []
    for keyword, value in keywords.items():
        if keyword in KEYWORD_HANDLERS:
            handlers += [value] * (value is not None)
            continue
        if keyword in KEYWORD_FLAGS:
            slot, implied = KEYWORD_FLAGS[keyword]
            value = implied if value else None
        elif keyword in KEYWORD_SLOTS:
            slot = KEYWORD_SLOTS[keyword]
        else:
            candidates = [*KEYWORD_SLOTS, *KEYWORD_FLAGS, *KEYWORD_HANDLERS, *slots, *known]
            near = difflib.get_close_matches(keyword, candidates, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Accelerator takes no argument {keyword!r}{hint}")
        if value is None:
            continue
        if slot in filled and filled[slot] != value:
            raise TypeError(
                f"{keyword}={value!r} and {spelled[slot]}={filled[slot]!r} both fill the slot {slot!r}; give one"
            )
        filled[slot], spelled[slot] = value, keyword
    return Keywords(filled, tuple(handlers))
