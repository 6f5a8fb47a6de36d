"""Checkpoints: the engine's own files, whole weights, and the way from one number of processes to another."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchport.checkpoint.weights import load_weights, save_weights
from torchport.errors import CheckpointError
from torchport.runtime import Runtime

from torchport_deepspeed import universal, vendor
from torchport_deepspeed.helpers import gathered_parameters
from torchport_deepspeed.together import come

FORMAT = "deepspeed"
"""The name of this format in a checkpoint's manifest."""

_FACTS = "engine.json"
_LAYOUTS = {0: "whole", 1: "flat", 2: "flat", 3: "by parameter"}
"""How the states of each stage are laid out; those of one layout can be converted into each other."""
_TAG = "pytorch_model"
_MODEL_FILE = "mp_rank_00_model_states.pt"
_CODE = frozenset({
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
})  # fmt: skip
"""The only classes, besides PyTorch's tensors, that DeepSpeed's own files are made of."""

IsEngine = Callable[[torch.nn.Module], bool]


def save(models: Mapping[int, torch.nn.Module], folder: Path, is_engine: IsEngine) -> None:
    """Let each engine save its own files; call it on every process.

    Args:
        models: Prepared models by number.
        folder: The checkpoint that is being written.
        is_engine: Says which models are engines.
    """
    latest = True
    for index, model in models.items():
        if is_engine(model) and _trains(model):
            engine: Any = model
            with vendor.quietly():
                engine.save_checkpoint(str(folder), tag=_tag(index), save_latest=latest)
            latest = False
            if dist.get_rank() == 0:
                (folder / _tag(index) / _FACTS).write_text(json.dumps(_facts(engine)))
            continue
        state = whole_weights(model) if is_engine(model) else model.state_dict()
        if dist.get_rank() == 0:
            save_weights(state, folder / f"{_tag(index)}.safetensors")


def load(models: Mapping[int, torch.nn.Module], folder: Path, is_engine: IsEngine) -> None:
    """Load what `save` wrote; call it on every process.

    Raises:
        CheckpointError: if a file holds other code than DeepSpeed's own, or fits neither this number of
            processes nor can be converted.
    """
    for index, model in models.items():
        path = folder / f"{_tag(index)}.safetensors"
        if path.is_file():
            weights = load_weights(path)
            load_whole_weights(model, weights) if is_engine(model) else model.load_state_dict(weights)
        else:
            _load_engine(model, folder, _tag(index))


def _load_engine(engine: Any, folder: Path, tag: str) -> None:
    refuse_code(folder / tag)
    saved = json.loads((folder / tag / _FACTS).read_text())
    now = _facts(engine)
    if saved == now or (saved["stage"] == now["stage"] == 0):
        with vendor.quietly():
            found, _ = engine.load_checkpoint(str(folder), tag=tag)
        if found is None:
            raise CheckpointError(f"{folder / tag} could not be loaded by DeepSpeed")
        return
    if _LAYOUTS[saved["stage"]] != _LAYOUTS[now["stage"]]:
        raise CheckpointError(
            f"{folder} was saved with ZeRO stage {saved['stage']}, and this run has {now['stage']}",
            reason="DeepSpeed converts states between stages 1 and 2, and between numbers of processes; nothing else",
            hint="load whole weights before prepare(): load_checkpoint_in_model(), of what save_model() wrote",
        )
    with tempfile.TemporaryDirectory(prefix="torchport-universal-") as made:
        shared = [made]
        dist.broadcast_object_list(shared, src=0)
        place = Path(shared[0])
        error: list[str] = [""]
        if dist.get_rank() == 0:
            try:
                universal.convert(folder / tag, place / tag)
            except Exception as problem:
                error = [f"{type(problem).__name__}: {problem}"]
        dist.broadcast_object_list(error, src=0)
        if error[0]:
            raise CheckpointError(
                f"{folder / tag} cannot be converted for ZeRO stage {now['stage']} and"
                f" {now['world_size']} processes",
                found=f"it was saved with stage {saved['stage']} by {saved['world_size']}",
                reason=error[0],
            )
        engine._config.load_universal_checkpoint = True
        try:
            with vendor.quietly():
                engine.load_checkpoint(str(place), tag=tag)
            _load_buffers(engine, place / tag)
        finally:
            engine._config.load_universal_checkpoint = False
            dist.barrier()


def _load_buffers(engine: Any, folder: Path) -> None:
    """Load what the universal format leaves out: the model's buffers."""
    buffers = dict(engine.module.named_buffers())
    if not buffers:
        return
    path = sorted(folder.glob(f"*{_MODEL_FILE}"))[0]
    saved = torch.load(path, map_location="cpu", weights_only=False)["module"]  # looked through before
    for name, buffer in buffers.items():
        if name in saved:
            buffer.copy_(saved[name])


def refuse_code(folder: Path) -> None:
    """Refuse files that name other classes than DeepSpeed's states are made of: DeepSpeed would run their code.

    Raises:
        CheckpointError: naming file and classes.
    """
    for path in sorted(folder.rglob("*.pt")):
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _CODE
        if named:
            raise CheckpointError(
                f"{path} cannot be loaded",
                found=f"it names {', '.join(sorted(named))}",
                reason="states of an engine are tensors and plain values; anything else could run code",
            )


def whole_weights(engine: Any) -> dict[str, Any]:
    """Return the whole weights on the main process, and nothing on the others; call it on every process.

    Args:
        engine: The engine.

    Returns:
        Tensors by name, in the engine's precision; on the host with ZeRO stage 3.
    """
    runtime = Runtime.current
    if engine.zero_optimization_stage() != 3:
        state: dict[str, Any] = engine.module_state_dict()
        return state
    if runtime is not None:
        come("collecting the weights of a model that is partitioned (ZeRO stage 3)", runtime.topology)
    with vendor.quietly():
        return engine._zero3_consolidated_16bit_state_dict() or {}


def load_whole_weights(engine: Any, state: Mapping[str, Any]) -> Any:
    """Load whole weights into the module and into the engine's float32 copies; call it on every process.

    Args:
        engine: The engine.
        state: Tensors by name, the same on every process.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    module, optimizer = engine.module, engine.optimizer
    if engine.zero_optimization_stage() != 3:
        result = module.load_state_dict(state)
    else:
        result = None
        for name, parameter in module.named_parameters():
            with gathered_parameters([parameter], writeback=True), torch.no_grad():
                if dist.get_rank() == 0:
                    parameter.copy_(state[name])
        for name, buffer in module.named_buffers():
            if name in state:
                buffer.copy_(state[name])
    refresh = getattr(optimizer, "refresh_fp32_params", None)
    if refresh is None:
        return result
    refresh()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name in state:
            safe_set_full_fp32_param(parameter, state[name].to(engine.device, torch.float32))
    return result


def whole_optimizer(engine: Any) -> dict[str, Any]:
    """Return the whole state of the optimizer on every process; call it on every process.

    Args:
        engine: The engine.

    Returns:
        `state`, by name of parameter: float32 tensors of its shape, and numbers; and `param_groups` without parameters.
        Where ZeRO partitions nothing, that of the ordinary optimizer.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if engine.zero_optimization_stage() == 0:
        state: dict[str, Any] = inner.state_dict()
        return state
    from deepspeed.utils import safe_get_full_optimizer_state

    own: Mapping[str, Any] = next(iter(inner.state.values()), {})
    numbers = {
        name: value.item() if isinstance(value, torch.Tensor) else value
        for name, value in own.items()
        if not isinstance(value, torch.Tensor) or not value.ndim
    }
    names = sorted(own.keys() - numbers.keys())
    if names and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = (
            False  # parameters lose their states when these are loaded
        )
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    states = {}
    for parameter_name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
            states[parameter_name] = {name: value.clone() for name, value in whole.items()} | numbers
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return {"state": states, "param_groups": groups}


def load_whole_optimizer(engine: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Load the state of an ordinary optimizer, where ZeRO has not partitioned it.

    Raises:
        CheckpointError: where it has.
    """
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise CheckpointError(
            "the state of an ordinary optimizer cannot be loaded into a DeepSpeed engine",
            found=f"the engine's optimizer is a {type(inner).__name__}, which is partitioned",
            hint="save whole weights with save_model(), and load those before prepare()",
        )
    inner.load_state_dict(state)


def _facts(engine: Any) -> dict[str, Any]:
    stage = int(engine.zero_optimization_stage())
    return {"stage": stage, "world_size": dist.get_world_size(), "dtype": str(engine.get_data_types()[0])}


def _trains(engine: Any) -> bool:
    return getattr(engine, "checkpoint_engine", None) is not None


def _tag(index: int) -> str:
    return _TAG if index == 0 else f"{_TAG}_{index}"
