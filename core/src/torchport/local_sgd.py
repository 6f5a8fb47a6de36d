"""The documented place of `LocalSGD`."""

from torchport.training.local_sgd import LocalSGD

__all__ = ["LocalSGD"]
