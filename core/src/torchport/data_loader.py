"""The documented place of the prepared loaders."""

from torchport.data.dispatcher import DataLoaderDispatcher
from torchport.data.iterable import IterableDatasetShard
from torchport.data.loader import DataLoaderShard
from torchport.data.prepare import prepare_data_loader, skip_first_batches
from torchport.data.samplers import BatchSamplerShard, SeedableRandomSampler

__all__ = [
    "BatchSamplerShard",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "prepare_data_loader",
    "skip_first_batches",
]
