"""Four processes train; one is killed amid it."""

import os
import signal

import torch
from torch import nn
from torchport import Accelerator

accelerator = Accelerator()
model = nn.Linear(4, 4)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(10_000):
    if step == 3 and accelerator.process_index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
    optimizer.step()
    optimizer.zero_grad()
