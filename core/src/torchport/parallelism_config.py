"""Where documentation imports `ParallelismConfig` from."""

from torchport.plugin.parallelism import ParallelismConfig

__all__ = ["ParallelismConfig"]
