"""Losses of every way to shard, beside plain PyTorch in the same processes."""

import torch
import torch.distributed as dist
from shared import CLIP, Block, by_hand, report, run
from torch.distributed.device_mesh import init_device_mesh
from torchport import PartialState
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp

BLOCKS = {"transformer_cls_names_to_wrap": ["Block"]}
WAYS = {
    "full": {},
    "full, blocks": BLOCKS,
    "blocks by size": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 300},
    "blocks by a function": {"auto_wrap_policy": lambda module: isinstance(module, Block)},
    "grad-op": {"sharding_strategy": "SHARD_GRAD_OP", **BLOCKS},
    "no shard": {"sharding_strategy": "NO_SHARD", **BLOCKS},
    "hybrid": {"sharding_strategy": "HYBRID_SHARD", **BLOCKS},
    "offload": {"cpu_offload": True, **BLOCKS},
    "activations": {"activation_checkpointing": True, **BLOCKS},
    "prefetch": {"forward_prefetch": True, **BLOCKS},
    "no prefetch": {"backward_prefetch": "NO_PREFETCH", **BLOCKS},
    "ignored": {"ignored_params": r"head\..*", "ignored_modules": r"embed", **BLOCKS},
    "one rank loads": {"cpu_ram_efficient_loading": True, **BLOCKS},
}
LOOPS = {
    "accumulate 3": {"accumulate": 3, "steps": 7},
    "accumulate 2, clipped": {"accumulate": 2, "clip": CLIP},
    "bf16": {"precision": "bf16"},
    "bf16, accumulate 3": {"precision": "bf16", "accumulate": 3},
    "fp16, accumulate 2, clipped": {"precision": "fp16", "accumulate": 2, "clip": CLIP},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def hand(kind: str, loop: dict, mesh=None) -> list[float]:
    plain = {name: value for name, value in loop.items() if name != "precision"}
    precision = loop.get("precision", "no")
    return by_hand(kind, dtype=DTYPES.get(precision), scale=precision == "fp16", mesh=mesh, **plain)


def hybrid() -> dict:
    """Four processes: two groups of two."""
    results = {}
    for version in (1, 2):
        for name in ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2"):
            settings = Fsdp(fsdp_version=version, sharding_strategy=name, shard_group_size=2, **BLOCKS)
            results[f"{version} {name}"] = run(settings, accumulate=2, clip=CLIP)
    results["ddp"] = hand("ddp", {"accumulate": 2, "clip": CLIP})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    results["fsdp2"] = hand("fsdp2", {"accumulate": 2, "clip": CLIP}, mesh)
    return results


def main() -> None:
    state = PartialState()
    results = {}
    for version in (1, 2):
        for way, settings in WAYS.items():
            results[f"{version} {way}"] = run(Fsdp(fsdp_version=version, **settings), clip=CLIP)
        for name, loop in LOOPS.items():
            results[f"{version} {name}"] = run(Fsdp(fsdp_version=version, **BLOCKS), **loop)
    for kind in ("ddp", "fsdp1", "fsdp2"):
        results[f"hand {kind}"] = hand(kind, {"clip": CLIP})
        for name, loop in LOOPS.items():
            results[f"hand {kind} {name}"] = hand(kind, loop)
    assert dist.get_world_size() == state.num_processes
    report(results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
