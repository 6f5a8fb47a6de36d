"""One process: load what two processes saved, with the same and with other ZeRO stages."""

import json
import shutil
import sys
from pathlib import Path

import torch
from common import BATCH, STEPS, momenta, new, prepared, train, whole
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torchport.errors import TorchportError
from torchport.utils import DeepSpeedPlugin

FOLDER, SAVED = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for saved, stage in ((0, 0), (1, 1), (1, 2), (3, 3)):
    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = prepared(accelerator, batch=2 * BATCH)
    accelerator.load_state(SAVED / f"checkpoint_{saved}")
    loaded = whole(accelerator, model)
    states = momenta(accelerator, model, optimizer)
    found[f"{saved} to {stage}"] = {
        "loaded": loaded,
        "momenta": states,
        "on": train(accelerator, model, optimizer, loader),
    }

state = get_fp32_state_dict_from_zero_checkpoint(str(SAVED / "checkpoint_3"))
found["consolidated"] = float(sum(tensor.double().abs().sum() for tensor in state.values()))
for stage in (0, 2, 3):
    accelerator = new(DeepSpeedPlugin(zero_stage=stage), mixed_precision="bf16" if stage == 2 else "no")
    model = prepared(accelerator)[0]
    accelerator._contents.strategy.load_model_state_dict(model, state)
    found[f"whole into {stage}"] = whole(accelerator, model)


class Code:
    def __reduce__(self):
        return (Path.touch, (FOLDER / "executed",))


for saved, stage in ((0, 1), (0, 3), (1, 0), (2, 3), (3, 0)):
    try:
        accelerator = new(DeepSpeedPlugin(zero_stage=stage))
        prepared(accelerator)
        accelerator.load_state(SAVED / f"checkpoint_{saved}")
    except TorchportError as error:
        found[f"{saved} into {stage}"] = str(error)
shutil.copytree(SAVED / "checkpoint_1" / "pytorch_model", FOLDER / "pytorch_model")
(path,) = (FOLDER / "pytorch_model").glob("mp_rank_00_model_states.pt")
torch.save({"module": {}, "code": Code()}, path)
try:
    from torchport_deepspeed import checkpoint

    checkpoint.load({0: model}, FOLDER, lambda model: True)
except TorchportError as error:
    found["code"] = [str(error), (FOLDER / "executed").exists()]
(FOLDER / "rank0.json").write_text(json.dumps(found))
accelerator.end_training()
