"""The plan's name for the dataset of cached latents, teacher tokens and text: `cache/dataset.py`.

from dataset_sd15 import SD15AlignedDataset

dataset = SD15AlignedDataset("train.csv", "cache/latents", "cache/tokens", "cache/text")
"""

from cache.dataset import SD15AlignedDataset

__all__ = ["SD15AlignedDataset"]
