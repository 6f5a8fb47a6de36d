"""The documented place of `AcceleratedScheduler`."""

from torchport.training.scheduler import AcceleratedScheduler

__all__ = ["AcceleratedScheduler"]
