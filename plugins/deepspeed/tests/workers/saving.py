"""Save a checkpoint with each ZeRO stage, and train on."""

import json
import sys
from pathlib import Path

from common import STEPS, new, prepared, train, whole
from torchport.utils import DeepSpeedPlugin

FOLDER, SAVED = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for stage in (0, 1, 2, 3):
    accelerator = new(DeepSpeedPlugin(zero_stage=stage), gradient_accumulation_steps=STEPS)
    model, optimizer, loader = prepared(accelerator)
    train(accelerator, model, optimizer, loader)
    accelerator.save_state(SAVED / f"checkpoint_{stage}")
    weights = whole(accelerator, model)
    found[f"stage {stage}"] = {"weights": weights, "on": train(accelerator, model, optimizer, loader)}
(FOLDER / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.end_training()
