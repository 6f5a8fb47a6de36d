"""Every operation of the MPI process group against exact values. Prints `ok <check>` for each check that held."""

import asynchronous
import exact
import exchanges
import groups
import messages
import reductions
import torch
import torch.distributed as dist
from exact import RANK, SIZE, same
from job import join, say

for module in (reductions, exchanges, messages, asynchronous, groups):
    for name, check in list(vars(module).items()):
        if name.startswith("check_"):
            check()
            say("ok", RANK, name)
            dist.barrier()
exact.collectives.close()
assert not dist.is_initialized()
collectives, _ = join()  # the process group can be opened again
tensor = torch.ones(1)
dist.all_reduce(tensor)
same(tensor, torch.full((1,), float(SIZE)))
say("ok", RANK, "reopen")
collectives.close()
