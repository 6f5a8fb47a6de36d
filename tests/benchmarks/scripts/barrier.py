"""Meets the other process at a barrier and leaves: plain PyTorch, the same under every launcher."""

import os

import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
dist.destroy_process_group()
print("passed", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
