"""Cached latents, teacher tokens and text embeddings as a dataset, and the order in which training reads them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from errors import UserError
from preprocessing.manifest import read_table
from preprocessing.samples import read_samples
from preprocessing.shards import FieldReader


class SD15AlignedDataset(Dataset):
    """Items of one image: `latent (4, h, w)`, `dino_tokens (N, D)`, `encoder_hidden_states (77, 768)`, `class_id`.

    Latents and tokens are joined by id. An image of the CSV that is not in both caches is left out, and `left_out` counts
    them; text row c belongs to class c and `null_text (77, 768)` is the null prompt.

    Args:
        csv_path: CSV of script 1.
        latent_dir, dino_dir, clip_embeddings_path: folders of scripts 2, 3 and 4.
        need_tokens: False leaves the tokens unread (a run with λ = 0 does no alignment work).

    Raises `UserError` when a field is missing, unfinished or does not fit the others.
    """

    def __init__(
        self,
        csv_path: str | Path,
        latent_dir: str | Path,
        dino_dir: str | Path,
        clip_embeddings_path: str | Path,
        *,
        need_tokens: bool = True,
    ):
        self.latents = FieldReader(latent_dir, "latents")
        self.tokens = FieldReader(dino_dir, "tokens")
        table, self.text_manifest = read_table(clip_embeddings_path)
        self.text, self.null_text = table[:-1], table[-1]  # (n_classes, 77, 768), (77, 768)
        self.need_tokens = need_tokens
        listed = read_samples(csv_path)
        cached = set(self.latents.ids) & set(self.tokens.ids)
        self.samples = [sample for sample in listed if sample.id in cached]
        self.left_out = len(listed) - len(self.samples)
        if not self.samples:
            raise UserError(
                f"none of the images of {csv_path} is in {latent_dir} and {dino_dir}: check the paths"
            )
        most = max(sample.class_id for sample in self.samples)
        if most >= len(self.text):
            raise UserError(
                f"{csv_path} has class {most}, {clip_embeddings_path} only {len(self.text)} classes: run script 4 again"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor | int]]:
        samples = [self.samples[index] for index in indices]
        ids = [sample.id for sample in samples]
        fields = {"latent": torch.from_numpy(self.latents.read(ids))}  # (n, 4, h, w)
        if self.need_tokens:
            fields["dino_tokens"] = torch.from_numpy(self.tokens.read(ids))  # (n, N, D)
        return [
            {name: values[i] for name, values in fields.items()}
            | {"encoder_hidden_states": self.text[sample.class_id], "class_id": sample.class_id}
            for i, sample in enumerate(samples)
        ]


class StepSampler(Sampler[list[int]]):
    """Batches of indices as a pure function of the step: each epoch is a permutation drawn from (seed, epoch).

    Iteration starts at `first_step` and ends before `last_step`; the incomplete batch at the end of an epoch is dropped.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int, first_step: int, last_step: int):
        if num_samples < batch_size:
            raise UserError(f"{num_samples} images are fewer than data.batch_size = {batch_size}: lower it")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        steps_per_epoch = self.num_samples // self.batch_size
        order, order_epoch = None, -1
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
                order, order_epoch = torch.randperm(self.num_samples, generator=generator), epoch
            yield order[position * self.batch_size :][: self.batch_size].tolist()


PURPOSES = {"order": 0, "noise": 1}


def seed_of(purpose: str, seed: int, counter: int, rank: int = 0) -> int:
    """A seed for `torch.Generator`: of an epoch's order, or of the noise of a step on one rank."""
    key = (PURPOSES[purpose], seed, counter, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
