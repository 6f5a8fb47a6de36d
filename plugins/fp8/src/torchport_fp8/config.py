"""Settings of the precision `fp8`. Imports no torch: the command line reads them for `--help`."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, ClassVar

from torchport.config.kwargs import KwargsHandler
from torchport.config.schema import setting
from torchport.errors import ConfigurationError


class FP8Engine(str, enum.Enum):
    """The library that computes in 8 bits."""

    AO = "AO"
    TE = "TE"
    MSAMP = "MSAMP"

    @classmethod
    def _missing_(cls, value: object) -> FP8Engine | None:
        plain = str(value).upper().replace("-", "").replace("_", "").replace(" ", "")
        return {
            "AO": cls.AO, "TORCHAO": cls.AO, "TE": cls.TE, "TRANSFORMERENGINE": cls.TE, "MSAMP": cls.MSAMP,
        }.get(plain)  # fmt: skip


RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""Ways to scale a tensor into the range of 8 bits, as torchao names them."""

FORMATS = ("HYBRID", "E4M3", "E5M2")
ALGORITHMS = ("max", "most_recent")
LEVELS = ("O1", "O2")

_OWNERS: Mapping[FP8Engine, tuple[str, ...]] = {
    FP8Engine.AO: (
        "config", "module_filter_func", "recipe", "skip_first_last", "pad_inner_dim", "emulate",
        "enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp",
    ),
    FP8Engine.TE: (
        "use_autocast_during_eval", "margin", "interval", "fp8_format", "amax_history_len", "amax_compute_algo",
        "override_linear_precision", "use_mxfp8_block_scaling",
    ),
    FP8Engine.MSAMP: ("opt_level",),
}  # fmt: skip
"""The settings that only one engine has."""


@dataclass(kw_only=True)
class FP8RecipeKwargs(KwargsHandler):
    """How linear layers are computed in 8-bit floating point.

    `AORecipeKwargs`, `TERecipeKwargs` and `MSAMPRecipeKwargs` are the same with the engine chosen.

    Attributes:
        backend: The engine: `"AO"` (torchao), `"TE"` (TransformerEngine) or `"MSAMP"`; `None` takes the first of
            torchao and TransformerEngine that is installed.
        skip_modules: Patterns of names of linear layers that stay as they are (`"lm_head"`, `"*.gate"`).
        recipe: torchao: how tensors are scaled: `"tensorwise"`, `"rowwise"` or `"rowwise_with_gw_hp"`.
        skip_first_last: torchao: whether the first and the last linear layer stay as they are.
        pad_inner_dim: torchao: whether the inner dimension of a product is padded to a multiple of 16.
        emulate: torchao: whether products are computed in higher precision from values rounded to 8 bits;
            `None` does so where the device has no FP8, and `False` refuses such a device.
        enable_fsdp_float8_all_gather: torchao: whether FSDP2 gathers weights in 8 bits.
        precompute_float8_dynamic_scale_for_fsdp: torchao: whether the scales of such weights are computed together,
            by one all-reduce after each optimizer step.
        config: torchao: a `torchao.float8.Float8LinearConfig`, instead of `recipe` and the other settings of scaling.
        module_filter_func: torchao: `function(module, name)` that says whether a linear layer is converted, instead
            of the rules for the first, the last, sizes and `skip_modules`.
        use_autocast_during_eval: TransformerEngine: whether evaluation computes in 8 bits too.
        margin: TransformerEngine: a scale is smaller than the largest possible by the factor 2^margin.
        interval: TransformerEngine: steps between two computations of scales (releases before 2.0).
        fp8_format: TransformerEngine: `"E4M3"`, or `"HYBRID"`: E4M3 in forward and E5M2 in backward.
        amax_history_len: TransformerEngine: steps whose largest values decide a scale.
        amax_compute_algo: TransformerEngine: `"max"` of that history, or `"most_recent"`.
        override_linear_precision: TransformerEngine: whether forward, input gradient and weight gradient are computed
            in higher precision (releases before 2.0).
        use_mxfp8_block_scaling: TransformerEngine: whether blocks of 32 values have scales of their own (MXFP8).
        opt_level: MS-AMP: `"O1"` or `"O2"`.
        optimization_level: The same, by an older name.

    Raises:
        ConfigurationError: if a setting has no such value, or belongs to another engine.
    """

    __torchport_prefix__: ClassVar[str] = "fp8"

    backend: FP8Engine | None = setting(
        None, help="The engine; by default the first that is installed of AO (torchao) and TE (TransformerEngine).",
        choices=tuple(engine.value for engine in FP8Engine), yaml="backend",
    )  # fmt: skip
    skip_modules: tuple[str, ...] = setting(
        (), help="Patterns of names of linear layers that stay as they are.", yaml="skip_modules"
    )
    recipe: str = setting("tensorwise", help="AO: how tensors are scaled.", choices=RECIPES, yaml="recipe")
    skip_first_last: bool = setting(
        True, help="AO: leave the first and the last linear layer as they are.", yaml="skip_first_last"
    )
    pad_inner_dim: bool = setting(
        False, help="AO: pad the inner dimension of products to a multiple of 16.", yaml="pad_inner_dim"
    )
    emulate: bool | None = setting(
        None, help="AO: compute in higher precision from values rounded to 8 bits; by default where there is no FP8.",
        yaml="emulate",
    )  # fmt: skip
    enable_fsdp_float8_all_gather: bool = setting(
        False, help="AO: gather FSDP2's weights in 8 bits.", yaml="enable_fsdp_float8_all_gather"
    )
    precompute_float8_dynamic_scale_for_fsdp: bool = setting(
        False, help="AO: compute the scales of those weights together, after each optimizer step.",
        yaml="precompute_float8_dynamic_scale_for_fsdp",
    )  # fmt: skip
    config: Any = None
    module_filter_func: Callable[[Any, str], bool] | None = None
    use_autocast_during_eval: bool = setting(
        False, help="TE: compute in 8 bits during evaluation too.", yaml="use_autocast_during_eval"
    )
    margin: int = setting(0, help="TE: scales are smaller by the factor 2^margin.", yaml="margin")
    interval: int = setting(1, help="TE before 2.0: steps between computations of scales.", yaml="interval")
    fp8_format: str = setting(
        "HYBRID", help="TE: E4M3, or HYBRID: E4M3 in forward, E5M2 in backward.", choices=FORMATS,
        flag="fp8_format", yaml="fp8_format", env="FP8_FORMAT",
    )  # fmt: skip
    amax_history_len: int = setting(
        1024, help="TE: steps whose largest values decide a scale.", yaml="amax_history_len"
    )
    amax_compute_algo: str = setting(
        "most_recent", help="TE: how the history decides.", choices=ALGORITHMS, yaml="amax_compute_algo"
    )
    override_linear_precision: tuple[bool, bool, bool] = setting(
        (False, False, False), yaml="override_linear_precision",
        help="TE before 2.0: compute forward, input gradient, weight gradient in higher precision.",
    )  # fmt: skip
    use_mxfp8_block_scaling: bool = setting(
        False, help="TE: scale blocks of 32 values (MXFP8).", yaml="use_mxfp8_block_scaling"
    )
    opt_level: str = setting("O2", help="MS-AMP's optimization level.", choices=LEVELS, yaml="opt_level")
    optimization_level: InitVar[str | None] = None

    def __post_init__(self, optimization_level: str | None) -> None:
        if optimization_level is not None:
            self.opt_level = optimization_level
        if self.backend is not None:
            self.backend = _engine(self.backend)
        self.override_linear_precision = tuple(self.override_linear_precision)  # type: ignore[assignment]
        skip: Any = self.skip_modules
        self.skip_modules = (skip,) if isinstance(skip, str) else tuple(skip)
        self.fp8_format, self.opt_level = self.fp8_format.upper(), self.opt_level.upper()
        for name, choices in (
            ("recipe", RECIPES), ("fp8_format", FORMATS), ("amax_compute_algo", ALGORITHMS), ("opt_level", LEVELS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"fp8: {name} must be one of {', '.join(choices)}", found=repr(getattr(self, name))
                )
        if self.backend is None:
            self.backend = self._implied() or installed_engine()
        self._check_owner()
        self._check_torchao()

    def _changed(self, engine: FP8Engine) -> list[str]:
        """Name the settings of an engine that differ from their defaults."""
        defaults = {item.name: item.default for item in fields(FP8RecipeKwargs)}
        return [name for name in _OWNERS[engine] if getattr(self, name) != defaults[name]]

    def _implied(self) -> FP8Engine | None:
        """The engine that the given settings belong to, where they belong to one."""
        named = [engine for engine in FP8Engine if self._changed(engine)]
        return named[0] if len(named) == 1 else None

    def _check_owner(self) -> None:
        for engine in FP8Engine:
            changed = self._changed(engine)
            if engine is not self.backend and changed:
                chosen = self.backend.value if self.backend is not None else "none, as several are asked for"
                raise ConfigurationError(
                    f"fp8: {changed[0]} is a setting of the engine {engine.value}",
                    found=f"the engine is {chosen}",
                    hint=f"backend={engine.value!r} (--fp8-backend {engine.value}), or leave {changed[0]} out",
                )

    def _check_torchao(self) -> None:
        given = [name for name in ("recipe", "pad_inner_dim") if name in self._changed(FP8Engine.AO)]
        if self.config is not None and given:
            raise ConfigurationError(
                f"fp8: config and {given[0]} are both given", reason="the config says all about scaling",
                hint="give one of them",
            )  # fmt: skip
        if self.enable_fsdp_float8_all_gather and self.recipe != "tensorwise":
            raise ConfigurationError(
                f"fp8: enable_fsdp_float8_all_gather with the recipe {self.recipe!r}",
                reason="weights that are gathered in 8 bits have one scale for the whole tensor",
                hint="recipe='tensorwise', or no float8 all-gather",
            )
        if self.precompute_float8_dynamic_scale_for_fsdp and not self.gathers_float8:
            raise ConfigurationError(
                "fp8: precompute_float8_dynamic_scale_for_fsdp without enable_fsdp_float8_all_gather",
                reason="there is no gathering in 8 bits whose scales could be computed",
                hint="enable_fsdp_float8_all_gather=True (--fp8-enable-fsdp-float8-all-gather)",
            )

    @property
    def gathers_float8(self) -> bool:
        """Whether FSDP2 is to gather weights in 8 bits."""
        return self.enable_fsdp_float8_all_gather or bool(
            getattr(self.config, "enable_fsdp_float8_all_gather", False)
        )


@dataclass(kw_only=True)
class AORecipeKwargs(FP8RecipeKwargs):
    """FP8 by torchao: `FP8RecipeKwargs` with its engine chosen."""

    backend: FP8Engine | None = FP8Engine.AO


@dataclass(kw_only=True)
class TERecipeKwargs(FP8RecipeKwargs):
    """FP8 by TransformerEngine: `FP8RecipeKwargs` with its engine chosen."""

    backend: FP8Engine | None = FP8Engine.TE


@dataclass(kw_only=True)
class MSAMPRecipeKwargs(FP8RecipeKwargs):
    """FP8 by MS-AMP, which is no longer maintained: asking for it is an error that says so."""

    backend: FP8Engine | None = FP8Engine.MSAMP


def installed_engine() -> FP8Engine | None:
    """Return the first maintained engine whose library is installed."""
    for engine, module in ((FP8Engine.AO, "torchao"), (FP8Engine.TE, "transformer_engine")):
        if importlib.util.find_spec(module) is not None:
            return engine
    return None


def _engine(value: Any) -> FP8Engine:
    try:
        return FP8Engine(value)
    except ValueError as error:
        raise ConfigurationError(
            f"fp8: backend must be one of {', '.join(engine.value for engine in FP8Engine)}",
            found=repr(value),
        ) from error


__all__ = ["AORecipeKwargs", "FP8Engine", "FP8RecipeKwargs", "MSAMPRecipeKwargs", "TERecipeKwargs"]
