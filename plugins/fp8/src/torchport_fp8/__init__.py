"""8-bit floating point: descriptors only; imports no torch. Public names are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torchport.plugin import PrecisionSpec, Requirements, hookimpl, lazy_exports

if TYPE_CHECKING:
    from torchport_fp8.ao import convert_model_to_fp8_ao, filter_linear_layers, has_ao_layers
    from torchport_fp8.config import (
        AORecipeKwargs,
        FP8Engine,
        FP8RecipeKwargs,
        MSAMPRecipeKwargs,
        TERecipeKwargs,
    )
    from torchport_fp8.te import (
        apply_fp8_autowrap,
        contextual_fp8_autocast,
        convert_model,
        fp8_autowrap,
        has_transformer_engine_layers,
    )


@hookimpl
def torchport_precisions() -> Iterable[PrecisionSpec]:
    """Offer matrix products in 8-bit floating point, the rest under autocast to bfloat16."""
    yield PrecisionSpec(
        name="fp8",
        aliases=("float8",),
        factory="torchport_fp8.precision:Float8Precision",
        config="torchport_fp8.config:FP8RecipeKwargs",
        summary="linear layers in 8-bit floating point (torchao or TransformerEngine), the rest in bf16",
        needs=Requirements(autocast=frozenset({"bfloat16"})),
    )


@hookimpl
def torchport_plan_resolved(plan: Any) -> Iterable[str]:
    """Refuse what the chosen engine cannot do here, and say where the device emulates it."""
    if plan.precision != "fp8":
        return ()
    from torchport_fp8.check import check

    return check(plan)


_EXPORTS = {
    "AORecipeKwargs": ".config",
    "FP8Engine": ".config",
    "FP8RecipeKwargs": ".config",
    "MSAMPRecipeKwargs": ".config",
    "TERecipeKwargs": ".config",
    "apply_fp8_autowrap": ".te",
    "contextual_fp8_autocast": ".te",
    "convert_model": ".te",
    "convert_model_to_fp8_ao": ".ao",
    "filter_linear_layers": ".ao",
    "fp8_autowrap": ".te",
    "has_ao_layers": ".ao",
    "has_transformer_engine_layers": ".te",
}

__all__ = [
    "AORecipeKwargs",
    "FP8Engine",
    "FP8RecipeKwargs",
    "MSAMPRecipeKwargs",
    "TERecipeKwargs",
    "apply_fp8_autowrap",
    "contextual_fp8_autocast",
    "convert_model",
    "convert_model_to_fp8_ao",
    "filter_linear_layers",
    "fp8_autowrap",
    "has_ao_layers",
    "has_transformer_engine_layers",
]

__getattr__: Callable[[str], Any] = lazy_exports(__name__, _EXPORTS)
