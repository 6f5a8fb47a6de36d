"""What the engine of a plan can do on its backend, before anything is built. Imports no engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from torchport.errors import IncompatibleError, UnavailableError
from torchport.plan.registry import load_reference
from torchport.plugin import missing_runtime

from torchport_fp8.config import FP8Engine, FP8RecipeKwargs

TORCHAO = "torchao>=0.18"
INSTALL_TE = "pip install --no-build-isolation 'torchport-fp8[te]'"


def check(plan: Any) -> Iterable[str]:
    """Return what the operator should hear about a plan.

    Args:
        plan: The plan.

    Raises:
        UnavailableError: if the engine's library is not installed, or no longer maintained.
        IncompatibleError: if the backend or the strategy lacks what is asked for.
    """
    decision = plan["precision"]
    config = decision.config
    if not isinstance(config, FP8RecipeKwargs):
        return ()
    asked = f"{decision.source} asks for the precision {decision.name!r}"
    spec = plan["backend"].spec
    features = load_reference(spec.factory)(spec).capabilities().features
    if config.backend is FP8Engine.AO:
        return _torchao(config, asked, plan, features)
    if config.backend is FP8Engine.TE:
        return _transformer_engine(config, asked, plan.backend, features)
    if config.backend is FP8Engine.MSAMP:
        raise UnavailableError(
            f"{asked} with the engine MS-AMP",
            reason="MS-AMP is no longer maintained and does not go with today's PyTorch",
            hint="another engine: --fp8-backend AO (torchao) or TE (TransformerEngine), AORecipeKwargs()",
        )
    raise UnavailableError(
        asked,
        found="neither torchao nor TransformerEngine is installed",
        hint=f"pip install 'torchport-fp8[torchao]', or {INSTALL_TE}",
    )


def _torchao(config: FP8RecipeKwargs, asked: str, plan: Any, features: frozenset[str]) -> Iterable[str]:
    missing = missing_runtime((TORCHAO,))
    if missing:
        raise UnavailableError(f"{asked} with the engine torchao", reason=missing)
    if config.gathers_float8:
        version = getattr(plan["strategy"].config, "fsdp_version", None)
        if plan.strategy != "fsdp" or version not in (None, 2):
            raise IncompatibleError(
                f"{asked} with enable_fsdp_float8_all_gather",
                found=f"the strategy is {plan.strategy!r}" + (f", version {version}" if version else ""),
                reason="only FSDP2 gathers weights in 8 bits",
                hint="--strategy fsdp --fsdp-version 2, or leave enable_fsdp_float8_all_gather out",
            )
    if "fp8" in features or config.emulate:
        return ()
    if config.emulate is False:
        raise IncompatibleError(
            f"{asked} without emulation",
            reason=f"the backend {plan.backend!r} has no FP8",
            hint="leave emulate out (--fp8-emulate), or choose another backend",
        )
    return (
        f"precision {plan.precision!r} is emulated, as the backend {plan.backend!r} has no FP8: values are rounded"
        " to 8 bits, products are computed in bf16, and nothing is faster (--fp8-emulate says that this is meant)",
    )


def _transformer_engine(
    config: FP8RecipeKwargs, asked: str, backend: str, features: frozenset[str]
) -> Iterable[str]:
    asked = f"{asked} with the engine TransformerEngine"
    if importlib.util.find_spec("transformer_engine") is None:
        raise UnavailableError(asked, reason="transformer_engine is not installed", hint=INSTALL_TE)
    needed = "mxfp8" if config.use_mxfp8_block_scaling else "fp8"
    if needed not in features:
        raise IncompatibleError(
            asked,
            reason=f"it needs a device with {needed.upper()}, and the backend {backend!r} has none",
            hint="--fp8-backend AO, which emulates FP8 where the device has none",
        )
    return ()


def emulates(config: FP8RecipeKwargs, features: frozenset[str]) -> bool:
    """Whether torchao has to emulate FP8 on a device with these features, or was asked to."""
    return "fp8" not in features if config.emulate is None else config.emulate
