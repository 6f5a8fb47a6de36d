"""The documented place of the prepared loaders."""

from torchport.data.iterable import IterableDatasetShard
from torchport.data.loader import DataLoaderShard, prepare_data_loader, skip_first_batches
from torchport.data.samplers import BatchSamplerShard, SeedableRandomSampler

__all__ = [
    "BatchSamplerShard",
    "DataLoaderShard",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "prepare_data_loader",
    "skip_first_batches",
]
