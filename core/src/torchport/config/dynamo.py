"""Settings of `torch.compile`. Imports no torch: the command line reads them for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torchport import envvars
from torchport.config.kwargs import KwargsHandler
from torchport.config.schema import setting


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """How prepared models are compiled (`torch.compile`).

    Attributes:
        backend: The compiler: a name of `torch.compiler.list_backends()`, in any case of letters, or a callable
            that takes a graph; `"no"` compiles nothing. `None` takes the environment's, or else the one that suits
            the device.
        mode: `"default"`, `"reduce-overhead"`, `"max-autotune"` or another mode of the compiler; `None` takes the
            environment's, or else leaves it to PyTorch.
        fullgraph: Whether what cannot be compiled in one graph is an error.
        dynamic: Whether shapes are symbolic; `None` compiles for the first shape, and symbolically if it changes.
        options: Further options of the compiler, instead of a mode.
        disable: Whether nothing is compiled, for finding faults.
        use_regional_compilation: Whether blocks that repeat are compiled one by one, which compiles the first and
            reuses it for the others; else the model is compiled as a whole.
    """

    __torchport_prefix__: ClassVar[str] = "dynamo"

    backend: Any = setting(
        None, help="Compile prepared models with this compiler, such as inductor.", env=envvars.DYNAMO_BACKEND
    )
    mode: str | None = setting(
        None, help="Mode of the compiler: default, reduce-overhead, max-autotune.", env=envvars.DYNAMO_MODE
    )
    fullgraph: bool | None = setting(
        None,
        help="Refuse what cannot be compiled in one graph.",
        flag="dynamo_use_fullgraph",
        yaml="dynamo_use_fullgraph",
        env=envvars.DYNAMO_FULLGRAPH,
    )
    dynamic: bool | None = setting(
        None,
        help="Compile for symbolic shapes.",
        flag="dynamo_use_dynamic",
        yaml="dynamo_use_dynamic",
        env=envvars.DYNAMO_DYNAMIC,
    )
    options: Any = setting(None, help="Further options of the compiler.", flag="", yaml="", env="")
    disable: bool = setting(False, help="Compile nothing.", flag="", yaml="", env="")
    use_regional_compilation: bool | None = setting(
        None,
        help="Compile blocks that repeat once, instead of the whole model.",
        env=envvars.DYNAMO_REGIONS,
    )

    def __post_init__(self) -> None:
        if isinstance(self.backend, (str, bool)):
            name = str(self.backend).lower()
            self.backend = "no" if name in ("no", "none", "false", "") else name

    def to_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `torch.compile` that were given."""
        kwargs = super().to_kwargs()
        kwargs.pop("use_regional_compilation", None)
        return kwargs
