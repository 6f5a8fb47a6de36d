"""Save, go on, load and go on again: within one way to shard, and from any to any other and any number of processes.

save FOLDER           train 3 steps with each strategy and save; then 3 more
load FOLDER NAME...   load what each strategy saved into each, and train 3 more
both FOLDER NAME...   save with all, and load with some
die FOLDER            save and go on; then save again and be killed on the way
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from parity import hybrid
from shared import Network, loss_of, prepared, report, train, whole
from torchport import PartialState
from torchport.errors import TorchportError
from torchport.plugin import shards
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp

BLOCKS = {"transformer_cls_names_to_wrap": ["Block"]}


def strategies() -> dict:
    world = PartialState().num_processes
    ways = {
        "2 sharded": Fsdp(**BLOCKS),
        "2 full": Fsdp(state_dict_type="FULL_STATE_DICT", **BLOCKS),
        "1 sharded": Fsdp(fsdp_version=1, state_dict_type="SHARDED_STATE_DICT", **BLOCKS),
        "1 full": Fsdp(fsdp_version=1, **BLOCKS),
        "plain": "single" if world == 1 else "ddp",
    }
    if world == 4:
        ways["hybrid"] = Fsdp(sharding_strategy="HYBRID_SHARD", shard_group_size=2, **BLOCKS)
    return ways


def go_on(accelerator, model, optimizer) -> list[float]:
    """Three steps on data that do not depend on the number of processes: all see the batches of rank 0."""
    losses = []
    for step in range(3, 6):
        loss = loss_of(model, step, 0)
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def save(folder: Path, names: list[str]) -> dict:
    results = {}
    for name, strategy in strategies().items():
        if names and name not in names:
            continue
        accelerator, model, optimizer = prepared(strategy, model=Network(seed=1))
        train(accelerator, model, optimizer, 3)
        accelerator.save_state(folder / name)
        saved = whole(accelerator, model)
        results[name] = {"losses": go_on(accelerator, model, optimizer), "saved": saved}
    return results


def load(folder: Path, names: list[str]) -> dict:
    results = {}
    for name, strategy in strategies().items():
        if names and name not in names:
            continue
        for source in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            fresh = Network(seed=2)
            fresh.unsaved.fill_(3.0)  # a buffer that no checkpoint holds
            accelerator, model, optimizer = prepared(strategy, model=fresh)
            with accelerator.no_sync(model):  # gradients of a window that is given up
                accelerator.backward(100 * loss_of(model, 0, 0))
            accelerator.load_state(folder / source)
            if (source, name, accelerator.num_processes) == ("killed", "2 sharded", 4):
                accelerator.save_state(folder / "killed, then four")
            results[f"{source} -> {name}"] = {
                "saved": whole(accelerator, model),
                "losses": go_on(accelerator, model, optimizer),
            }
    return results


def die(folder: Path) -> None:
    """Be killed when one process has written its part of the second checkpoint."""
    accelerator, model, optimizer = prepared(Fsdp(**BLOCKS), model=Network(seed=1))
    train(accelerator, model, optimizer, 3)
    accelerator.save_state(folder / "killed")
    saved = whole(accelerator, model)
    results = {"killed": {"saved": saved, "losses": go_on(accelerator, model, optimizer)}}
    if accelerator.is_main_process:
        (folder / ".killed.json").write_text(json.dumps(results))
    write = shards.write_shards

    def write_and_die(tensors, place, plain=None):
        write(tensors, place, plain)
        if place.name == "optimizer_0" and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.write_shards = write_and_die
    accelerator.save_state(folder / "killed")


def main() -> None:
    what, folder, names = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    if what == "die":
        die(folder)
        return
    results = {}
    if what in ("save", "both"):
        results |= save(folder, [] if what == "both" else names)
    if what in ("load", "both"):
        results |= load(folder, names)
    if what == "both":
        results["parity"] = hybrid()
    if what == "load" and not names and PartialState().num_processes == 2:
        accelerator, _, _ = prepared(Fsdp(), model=torch.nn.Linear(3, 3))
        try:
            accelerator.load_state(folder / "2 sharded")
        except TorchportError as error:
            results["other model"] = str(error)
    report(results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
