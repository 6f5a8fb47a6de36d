"""The documented place of `AcceleratedOptimizer`."""

from torchport.training.optimizer import AcceleratedOptimizer

__all__ = ["AcceleratedOptimizer"]
