"""Train some steps from the newest checkpoint, with a global batch that does not depend on the number of processes.

reshard.py FOLDER PROJECT FIRST LAST [MODE]

FIRST and LAST are numbers of steps. The loss over the global batch of each step, the learning rate and a random
number of each process go to FOLDER/rankR.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torchport import Accelerator, Progress
from torchport.utils import gather, set_seed

BATCH = 12
STEPS = 16


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(BATCH, 5, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True).sin()


def main() -> None:
    folder, project, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    precision = sys.argv[5] if len(sys.argv) > 5 else "no"
    accelerator = Accelerator(project_dir=project, resume="auto", precision=precision)
    processes, rank = accelerator.num_processes, accelerator.process_index
    set_seed(3)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    every = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3 * processes, gamma=0.7)
    model, optimizer, every = accelerator.prepare(model, optimizer, every)
    other = nn.ParameterList([torch.zeros(1)])
    second = torch.optim.SGD(other.parameters(), lr=1.0)
    linear = torch.optim.lr_scheduler.LambdaLR(second, lambda n: 1 - n / (STEPS * processes))
    _, second, linear = accelerator.prepare(other, second, linear)
    progress = Progress(step=0)
    accelerator.register_for_checkpointing(progress)
    resumed = accelerator.resume()
    assert progress.step == first
    chance = torch.rand(1).item()
    losses, rates, others = [], [], []
    for step in range(first, last):
        inputs, targets = (whole.chunk(processes)[rank] for whole in batch(step))
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        every.step()
        second.step()
        linear.step()
        losses.append(gather(loss).mean().item())
        rates.append(every.get_last_lr()[0])
        others.append(linear.get_last_lr()[0])
    progress.step = last
    accelerator.save_state(blocking=False)
    accelerator.end_training()
    told = {"losses": losses, "rates": rates, "others": others, "chance": chance, "resumed": resumed}
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
