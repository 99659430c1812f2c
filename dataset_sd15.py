"""The plan's name for the dataset of cached latents, teacher tokens and text, and of its arguments: `cache/dataset.py`.

from dataset_sd15 import SD15AlignedDataset

dataset = SD15AlignedDataset("train.csv", "cache/latents", "cache/tokens", "cache/text")
dataset[0]      # latent (4, h, w), dino_tokens (N, D), prompt_embeds (77, 768), class_id
"""

from cache.dataset import AlignedDataset


class SD15AlignedDataset(AlignedDataset):
    """An `AlignedDataset` with the plan's arguments."""

    def __init__(self, csv_path, latent_dir, dino_dir, clip_embeddings_path, *, need_tokens: bool = True):
        super().__init__(csv_path, latent_dir, dino_dir, clip_embeddings_path, need_tokens=need_tokens)
