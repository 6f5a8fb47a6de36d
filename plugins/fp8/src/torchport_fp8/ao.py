"""FP8 by torchao: linear layers whose products are computed in 8 bits, over the same parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchport_fp8.config import FP8RecipeKwargs


class _Quiet(logging.Filter):
    """Drops what torchao logs on a healthy import: kernels for other devices, and notes to developers of PyTorch."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not text.startswith("Failed to load") and "register_constant" not in text


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    quiet = _Quiet()
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)


with _quiet_import():
    from torchao.float8 import (
        Float8LinearConfig,
        ScalingType,
        convert_to_float8_training,
        precompute_float8_dynamic_scale_for_fsdp,
    )
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

Filter = Callable[[torch.nn.Module, str], bool]


def has_ao_layers(model: torch.nn.Module) -> bool:
    """Whether some linear layer of a model computes in 8 bits by torchao."""
    return any(isinstance(module, Float8Linear) for module in model.modules())


def filter_linear_layers(
    module: torch.nn.Module,
    fqn: str,
    first_layer_name: str | None = None,
    last_layer_name: str | None = None,
    skip_modules: tuple[str, ...] = (),
) -> bool:
    """Whether a layer is to be converted: by its class, size and name.

    Args:
        module: The layer. Only linear ones with the `forward` of `torch.nn.Linear` are converted, whose numbers of
            inputs and outputs are multiples of 16.
        fqn: Its name in the model.
        first_layer_name: A name that is left out.
        last_layer_name: Another one.
        skip_modules: Patterns of names that are left out; `"lm_head"` also leaves out `"model.lm_head"`.
    """
    if not isinstance(module, torch.nn.Linear) or type(module).forward is not torch.nn.Linear.forward:
        return False
    if module.in_features % 16 or module.out_features % 16:
        return False
    if fqn in (first_layer_name, last_layer_name):
        return False
    return not any(fnmatch.fnmatch(fqn, p) or fnmatch.fnmatch(fqn, f"*.{p}") for p in skip_modules)


def convert_model_to_fp8_ao(
    model: torch.nn.Module,
    config: Any = None,
    module_filter_func: Filter | None = None,
    *,
    skip_first_last: bool = True,
    skip_modules: tuple[str, ...] = (),
) -> torch.nn.Module:
    """Convert linear layers of a model in place, and return it.

    Parameters stay the same objects under the same names, so that optimizers made before go on with them. What was
    hung on a layer (hooks, attributes) stays.

    Args:
        model: The model; one that is a single linear layer is replaced.
        config: A `torchao.float8.Float8LinearConfig`; `None` scales whole tensors.
        module_filter_func: `function(module, name)` that says whether a linear layer is converted; `None` takes
            `filter_linear_layers`.
        skip_first_last: Whether the first and the last linear layer stay as they are, without a filter.
        skip_modules: Patterns of names of layers that stay as they are, without a filter.
    """
    config = config or Float8LinearConfig()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = list(linears)
    first, last = (names[0], names[-1]) if skip_first_last and names else (None, None)

    def chosen(module: torch.nn.Module, name: str) -> bool:
        if isinstance(module, Float8Linear):
            return False
        if module_filter_func is not None:
            return module_filter_func(module, name)
        return filter_linear_layers(module, name, first, last, skip_modules)

    plain = dataclasses.replace(config, enable_fsdp_float8_all_gather=False)
    converted: torch.nn.Module = convert_to_float8_training(model, module_filter_fn=chosen, config=plain)
    for name, before in linears.items():
        after = converted.get_submodule(name)
        if after is not before:
            _take_over(after, before)
            if config.enable_fsdp_float8_all_gather:
                _gather_in_float8(after, config)
    return converted


class TorchaoEngine:
    """Converts models as settings say.

    Args:
        settings: The settings of the precision.
        emulate: Whether the device has no FP8.
        device: The device of the run.
        announce: Whether this process may say something to the user.
    """

    def __init__(
        self, settings: FP8RecipeKwargs, emulate: bool, device: torch.device, *, announce: bool = True
    ) -> None:
        self.settings = settings
        self.config = linear_config(settings, emulate)
        self.device = device
        self.announce = announce

    def convert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert the linear layers of a model, and say so where there is none to convert."""
        settings = self.settings
        model = convert_model_to_fp8_ao(
            model,
            self.config,
            settings.module_filter_func,
            skip_first_last=settings.skip_first_last,
            skip_modules=settings.skip_modules,
        )
        layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
        if not layers and self.announce:
            print(  # noqa: T201
                f"torchport: precision 'fp8' converts no layer of {type(model).__name__}, which computes in bf16:"
                " the first and the last linear layer are left as they are (--fp8-skip-first-last false),"
                " and those whose sizes are not multiples of 16",
                file=sys.stderr,
            )
        for layer in layers:
            if self._mixes_dtypes(layer):
                layer.register_forward_pre_hook(_cast_to_autocast)
        return model

    def revert(self, model: torch.nn.Module) -> None:
        """Make ordinary linear layers of converted ones again, in place, over the same parameters."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is Float8Linear and not _is_sharded(child.weight):
                    setattr(parent, name, _plain(child))

    def _mixes_dtypes(self, layer: Any) -> bool:
        """Whether a product of the backward would meet two dtypes, as torchao heeds autocast on one device only."""
        if self.device.type == "cuda":
            return False
        disabled: bool = layer.config.cast_config_input_for_grad_weight.scaling_type is ScalingType.DISABLED
        return disabled and _cast_to_autocast not in layer._forward_pre_hooks.values()


def linear_config(settings: FP8RecipeKwargs, emulate: bool) -> Any:
    """Return torchao's configuration (`Float8LinearConfig`) for the settings."""
    config = settings.config
    if config is None:
        config = Float8LinearConfig.from_recipe_name(settings.recipe)
        config = dataclasses.replace(config, pad_inner_dim=settings.pad_inner_dim)
    return dataclasses.replace(
        config,
        emulate=emulate or config.emulate,
        enable_fsdp_float8_all_gather=settings.gathers_float8,
    )


def precompute_scales(model: torch.nn.Module) -> None:
    """Compute the scales of a sharded model's 8-bit weights together, by one all-reduce."""
    precompute_float8_dynamic_scale_for_fsdp(model)


def _take_over(after: torch.nn.Module, before: torch.nn.Module) -> None:
    """Give a converted layer the mode, hooks and further attributes of the layer that it replaces."""
    after.training = before.training
    for key, value in before.__dict__.items():
        if "hooks" in key or key not in after.__dict__:
            after.__dict__[key] = value


def _gather_in_float8(layer: Any, config: Any) -> None:
    """Make a weight one that FSDP2 gathers in 8 bits; it stays the same object, as optimizers know it."""
    layer.config = config
    weight = layer.weight
    if isinstance(weight, WeightWithDynamicFloat8CastTensor):
        return  # shared with a layer that was converted before
    inner = weight.detach()
    cast = WeightWithDynamicFloat8CastTensor(
        inner, layer.linear_mm_config, config.cast_config_weight.target_dtype
    )
    wrapped = torch.nn.Parameter(cast, requires_grad=weight.requires_grad)
    swap: Any = torch.utils.swap_tensors
    swap(weight, wrapped)


def _plain(layer: Any) -> torch.nn.Linear:
    with torch.device("meta"):
        made = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    weight = layer.weight
    if isinstance(weight, WeightWithDynamicFloat8CastTensor):
        inner = torch.nn.Parameter(weight._tensor.detach(), requires_grad=weight.requires_grad)
        swap: Any = torch.utils.swap_tensors
        swap(weight, inner)
    made.weight, made.bias = weight, layer.bias
    made.training = layer.training
    for key, value in layer.__dict__.items():
        if "hooks" in key:
            made.__dict__[key] = value
    for number, hook in list(made._forward_pre_hooks.items()):
        if hook is _cast_to_autocast:
            del made._forward_pre_hooks[number]
    return made


def _is_sharded(parameter: Any) -> bool:
    """Whether a parameter is a part of a sharded one: FSDP2's, or FSDP1's, which its own tensors stand in for."""
    whole = isinstance(parameter, torch.nn.Parameter) and not getattr(parameter, "_fsdp_flattened", False)
    return not whole or hasattr(parameter, "device_mesh")


def _cast_to_autocast(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the input of a layer to the dtype of autocast, as torchao does by itself on CUDA."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return inputs
    return (inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:])
