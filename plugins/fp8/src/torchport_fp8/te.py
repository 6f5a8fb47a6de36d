"""FP8 by TransformerEngine: its linear and normalization layers over the same parameters, and its autocast.

Written against the public documentation of TransformerEngine 1 and 2
(https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/). The library is imported when it is used.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torchport.errors import ConfigurationError, UnavailableError

from torchport_fp8.check import INSTALL_TE
from torchport_fp8.config import FP8RecipeKwargs

_MARK = "_torchport_forward_before_fp8"


def library(module: str = "pytorch") -> Any:
    """Import a module of TransformerEngine.

    Raises:
        UnavailableError: with what to type, if it cannot be imported.
    """
    try:
        return importlib.import_module(f"transformer_engine.{module}")
    except (ImportError, OSError) as error:
        raise UnavailableError(
            "fp8 with the engine TransformerEngine", reason=str(error), hint=INSTALL_TE
        ) from error


def make_recipe(settings: FP8RecipeKwargs) -> Any:
    """Return TransformerEngine's recipe for the settings: `DelayedScaling`, or `MXFP8BlockScaling`.

    Raises:
        ConfigurationError: for a setting that the installed release does not have.
    """
    recipes = library("common.recipe")
    kind = recipes.MXFP8BlockScaling if settings.use_mxfp8_block_scaling else recipes.DelayedScaling
    known = inspect.signature(kind).parameters
    defaults = FP8RecipeKwargs(backend=settings.backend)
    arguments: dict[str, Any] = {}
    for name in (
        "margin", "interval", "fp8_format", "amax_history_len", "amax_compute_algo", "override_linear_precision",
    ):  # fmt: skip
        value = getattr(settings, name)
        changed = value != getattr(defaults, name)
        if name not in known and changed:
            raise ConfigurationError(
                f"fp8: {name}={value!r}",
                reason=f"{kind.__name__} of the installed TransformerEngine has no {name}",
                hint=f"leave {name} out; it has {', '.join(known)}",
            )
        if name in known and (changed or not settings.use_mxfp8_block_scaling):  # MXFP8's own defaults differ
            arguments[name] = getattr(recipes.Format, value) if name == "fp8_format" else value
    return kind(**arguments)


def has_transformer_engine_layers(model: torch.nn.Module) -> bool:
    """Whether a model has a layer of TransformerEngine."""
    te = library()
    kinds = tuple(
        getattr(te, name) for name in ("Linear", "LayerNorm", "TransformerLayer") if hasattr(te, name)
    )
    return any(isinstance(module, kinds) for module in model.modules())


def convert_model(
    model: torch.nn.Module,
    to_transformer_engine: bool = True,
    _convert_linear: bool = True,
    _convert_ln: bool = True,
    *,
    skip_modules: tuple[str, ...] = (),
) -> torch.nn.Module:
    """Replace linear and normalization layers of a model by TransformerEngine's, or these by PyTorch's, in place.

    Parameters stay the same objects under the same names, so that optimizers made before go on with them. Linear
    layers are replaced if their numbers of inputs and outputs are multiples of 16, normalization layers if they are
    over one dimension and have weight and bias.

    Args:
        model: The model; layers inside it are replaced.
        to_transformer_engine: Whether to replace PyTorch's layers; if not, TransformerEngine's.
        _convert_linear: Whether to replace linear layers.
        _convert_ln: Whether to replace normalization layers.
        skip_modules: Patterns of names of linear layers that stay as they are.
    """
    te = library()
    replace = _to_te if to_transformer_engine else _to_torch
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            full = f"{parent_name}.{name}" if parent_name else name
            if any(fnmatch.fnmatch(full, p) or fnmatch.fnmatch(full, f"*.{p}") for p in skip_modules):
                continue
            made = replace(child, te, _convert_linear, _convert_ln)
            if made is not None:
                made.train(child.training)
                for key, parameter in child._parameters.items():
                    if parameter is not None and parameter.numel():
                        setattr(made, key, parameter)
                setattr(parent, name, made)
    return model


def _to_te(layer: Any, te: Any, linear: bool, norm: bool) -> torch.nn.Module | None:
    if linear and type(layer) is torch.nn.Linear and not (layer.in_features % 16 or layer.out_features % 16):
        made: torch.nn.Module = te.Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            params_dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        return made
    if (
        norm
        and type(layer) is torch.nn.LayerNorm
        and len(layer.normalized_shape) == 1
        and layer.bias is not None
    ):
        normalization: torch.nn.Module = te.LayerNorm(
            layer.normalized_shape[0],
            eps=layer.eps,
            params_dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        return normalization
    return None


def _to_torch(layer: Any, te: Any, linear: bool, norm: bool) -> torch.nn.Module | None:
    if linear and isinstance(layer, te.Linear):
        bias = layer._parameters.get("bias")
        with torch.device("meta"):
            return torch.nn.Linear(
                layer.in_features, layer.out_features, bias=bias is not None and bias.numel() > 0
            )
    if norm and isinstance(layer, te.LayerNorm):
        with torch.device("meta"):
            return torch.nn.LayerNorm(tuple(layer.weight.shape), eps=layer.eps)
    return None


def contextual_fp8_autocast(
    model_forward: Callable[..., Any], fp8_recipe: Any, use_during_eval: bool = False
) -> Callable[..., Any]:
    """Return a method that runs `model_forward` in 8 bits: in training, and in evaluation if asked for.

    Args:
        model_forward: The unbound `forward` of a module.
        fp8_recipe: A recipe of TransformerEngine.
        use_during_eval: Whether evaluation is in 8 bits too.
    """
    autocast = _autocast(fp8_recipe)

    @functools.wraps(model_forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with autocast(use_during_eval or self.training):
            return model_forward(self, *args, **kwargs)

    forward.__dict__[_MARK] = model_forward
    return forward


def _autocast(recipe: Any) -> Callable[[bool], AbstractContextManager[Any]]:
    """Return TransformerEngine's autocast; releases since 2.8 call it `autocast`, those before `fp8_autocast`."""
    te = library()
    if hasattr(te, "autocast"):
        return lambda enabled: te.autocast(enabled=enabled, recipe=recipe)
    return lambda enabled: te.fp8_autocast(enabled=enabled, fp8_recipe=recipe)


def apply_fp8_autowrap(model: torch.nn.Module, fp8_recipe_handler: FP8RecipeKwargs | None) -> torch.nn.Module:
    """Bind the `forward` of a model to TransformerEngine's autocast with a recipe, and return the model.

    Args:
        model: A model with layers of TransformerEngine.
        fp8_recipe_handler: The settings; `None` takes the defaults.
    """
    settings = fp8_recipe_handler or FP8RecipeKwargs(backend="TE")  # type: ignore[arg-type]
    bound = model.forward
    method = bound.__func__ if isinstance(bound, types.MethodType) else lambda self, *a, **k: bound(*a, **k)
    wrapped = contextual_fp8_autocast(method, make_recipe(settings), settings.use_autocast_during_eval)
    model.forward = types.MethodType(wrapped, model)
    return model


fp8_autowrap = apply_fp8_autowrap


def remove_fp8_autowrap(model: torch.nn.Module) -> None:
    """Give a model that `apply_fp8_autowrap` has bound its own `forward` back; leave any other as it is."""
    own = getattr(model.__dict__.get("forward"), _MARK, None)
    if own is type(model).forward:
        del model.forward
    elif own is not None:
        model.forward = types.MethodType(own, model)


class TransformerEngine:
    """Converts models as settings say.

    Args:
        settings: The settings of the precision.
    """

    def __init__(self, settings: FP8RecipeKwargs) -> None:
        self.settings = settings

    def convert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Replace layers, unless the model has some of TransformerEngine already, and bind its `forward`."""
        if not has_transformer_engine_layers(model):
            convert_model(model, skip_modules=self.settings.skip_modules)
        remove_fp8_autowrap(model)
        return apply_fp8_autowrap(model, self.settings)

    def revert(self, model: torch.nn.Module) -> None:
        """Take back what `convert` did."""
        remove_fp8_autowrap(model)
        convert_model(model, to_transformer_engine=False)
