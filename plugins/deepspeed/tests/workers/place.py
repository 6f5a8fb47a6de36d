"""Say where this process is, and what came with it."""

import json
import os
import sys
from pathlib import Path

import torch
from torchport import Accelerator

accelerator = Accelerator()
topology = accelerator.topology
place = {
    "rank": topology.rank,
    "world_size": topology.world_size,
    "node_rank": topology.node_rank,
    "local_rank": topology.local_rank,
    "source": topology.source,
    "sum": accelerator.reduce(torch.tensor(topology.rank + 1)).item(),
    "strategy": accelerator.plan.strategy,
    "stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
    "arguments": sys.argv[2:],
}
(Path(sys.argv[1]) / f"rank{topology.rank}.json").write_text(json.dumps(place))
accelerator.end_training()
