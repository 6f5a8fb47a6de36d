"""Two vendors' device types from outside of PyTorch in one process, in the order that was asked for."""

import json
import sys
from pathlib import Path

from torchport import Accelerator
from torchport.errors import TorchportError
from torchport.plan.discovery import discover

folder, site, first, second = sys.argv[1:]
sys.path.insert(0, site)

installed = discover({})
specs = {spec.name: spec for spec in installed.specs("backend")}
answers = [installed.probe(specs[name]) for name in (first, second)]
try:
    Accelerator(backend=second)
    refused = ""
except TorchportError as error:
    refused = str(error)
outcome = {
    "available": [answer.available for answer in answers],
    "reason": answers[1].reason,
    "refused": refused,
}
(Path(folder) / "rank0.json").write_text(json.dumps(outcome))
