"""One rank is told another precision than the others."""

import os

if os.environ["RANK"] == "1":
    os.environ["TORCHPORT_PRECISION"] = "bf16"

from torchport import Accelerator

Accelerator()
print("trained all the same")
