"""The plan's name for the dataset of cached latents, teacher tokens and text: `cache/dataset.py`.

from dataset_sd15 import SD15AlignedDataset

dataset = SD15AlignedDataset("train.csv", "cache/latents", "cache/tokens", "cache/text")
dataset[0]      # latent (4, h, w), dino_tokens (N, D), prompt_embeds (77, 768), class_id
"""

from cache.dataset import AlignedDataset as SD15AlignedDataset

__all__ = ["SD15AlignedDataset"]
