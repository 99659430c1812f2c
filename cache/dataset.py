"""Cached latents, teacher tokens and text embeddings as a dataset, and the order in which training reads them."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cache.image_list import read_samples
from cache.manifest import read_table
from cache.reader import FieldReader
from common.errors import UserError


class SD15AlignedDataset(Dataset):
    """Items of one image: `latent (4, h, w)`, `dino_tokens (N, D)`, `encoder_hidden_states (77, 768)`, `class_id`.

    Latents and tokens are joined by id. An image of the CSV that is not in both caches is left out, and `left_out` counts
    them; text row c belongs to class c and `null_text (77, 768)` is the null prompt. Any DataLoader can use it, with any
    start method; training reads raw batches instead (`read_batch`), several times faster.

    Args:
        csv_path: CSV of script 1.
        latent_dir, dino_dir, clip_embeddings_path: folders of scripts 2, 3 and 4. Without a `dino_dir` there are no tokens.
        need_tokens: False leaves the tokens unread (a run with λ = 0 does no alignment work).

    Raises `UserError` when a field is missing, unfinished or does not fit the others.
    """

    def __init__(
        self,
        csv_path: str | Path,
        latent_dir: str | Path,
        dino_dir: str | Path | None,
        clip_embeddings_path: str | Path,
        *,
        need_tokens: bool = True,
    ):
        self.latents = FieldReader(latent_dir, "latents")
        self.tokens = None if dino_dir is None else FieldReader(dino_dir, "tokens")
        table, self.text_manifest = read_table(clip_embeddings_path)
        self.text, self.null_text = table[:-1], table[-1]  # (n_classes, 77, 768), (77, 768)
        listed = read_samples(csv_path)
        cached = set(self.latents.ids)
        if self.tokens is not None:
            cached &= set(self.tokens.ids)
        samples = [sample for sample in listed if sample.id in cached]
        self.left_out = len(listed) - len(samples)
        if not samples:
            where = " and ".join(str(folder) for folder in (latent_dir, dino_dir) if folder is not None)
            raise UserError(f"none of the images of {csv_path} is in {where}: check the paths")
        self.ids = [sample.id for sample in samples]
        self.class_ids = torch.tensor([sample.class_id for sample in samples])  # (n,)
        if (most := int(self.class_ids.max())) >= len(self.text):
            raise UserError(
                f"{csv_path} has class {most}, {clip_embeddings_path} only {len(self.text)} classes: run script 4 again"
            )
        self.readers = {"latent": self.latents}
        if need_tokens and self.tokens is not None:
            self.readers["dino_tokens"] = self.tokens
        self._rows = {name: reader.rows(self.ids) for name, reader in self.readers.items()}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        # Memory of its own for each item: fresh blocks of a whole batch cost page faults and are kept by the allocator.
        raw = {
            name: [torch.empty(size, dtype=torch.uint8) for _ in indices]
            for name, size in self.value_bytes.items()
        }
        for name, reader in self.readers.items():
            reader.read_rows(self._rows[name][indices], [item.numpy() for item in raw[name]])
        items, decode = [], self.decode
        for i, class_id in enumerate(self.class_ids[indices]):
            values = {name: decode[name](raw[name][i][None]) for name in raw}
            values["latent"] = self.x_0(values["latent"])  # (1, 4, h, w)
            item = {name: value[0] for name, value in values.items()}
            items.append(item | {"encoder_hidden_states": self.text[class_id], "class_id": class_id})
        return items

    @property
    def value_bytes(self) -> dict[str, int]:
        """Stored bytes of one value of each field."""
        return {name: reader.spec.value_bytes for name, reader in self.readers.items()}

    @property
    def decode(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each field, from stored bytes `(n, value_bytes)` to values `(n, *shape)`, on any device."""
        return {name: reader.spec.decode for name, reader in self.readers.items()}

    @property
    def identity(self) -> dict[str, int]:
        """How many images there are, and the CRC-32 of their ids and classes: what the order of a training depends on."""
        lines = "".join(
            f"{key},{number}\n" for key, number in zip(self.ids, self.class_ids.tolist(), strict=True)
        )
        return {"images": len(self.ids), "crc32": zlib.crc32(lines.encode())}

    @property
    def latent_channels(self) -> int:
        """Channels of `latent`: half of what is stored where that is mean and standard deviation."""
        halves = 2 if self.latents.spec.details["posterior"] == "moments" else 1
        return self.latents.spec.shape[0] // halves

    def read_batch(self, indices: Sequence[int], raw: dict[str, Tensor]) -> None:
        """Fill `raw[name] (len(indices), value_bytes)` with what is stored of these items."""
        for name, reader in self.readers.items():
            reader.read_rows(self._rows[name][indices], raw[name].numpy())

    def x_0(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents `(B, 4, h, w)` in fp32 of what script 2 stored; of moments, a draw by `generator` or else the mean."""
        return latents_of(stored, self.latents.spec.details, generator)


def latents_of(stored: Tensor, details: dict, generator: torch.Generator | None = None) -> Tensor:
    """What the U-Net trains on, fp32 `(B, 4, h, w)`, of values and details that script 2 stored."""
    latents = stored.float()
    if details["posterior"] == "moments":
        mean, std = latents.chunk(2, dim=1)  # (B, 4, h, w) each
        latents = mean
        if generator is not None:
            latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
    return latents if details["scaled"] else latents * details["scaling_factor"]


class StepSampler(Sampler[list[int]]):
    """Batches of indices as a pure function of the step: each epoch is a permutation drawn from (seed, epoch).

    Iteration starts at `first_step` and ends before `last_step`. A step takes `accumulate` · n batches in a row for n ranks; of
    each n this rank, `ranks = (r, n)`, reads the r-th, so that ranks read disjoint images, and that a step sees the same images
    whatever shares they come in. What is too little for a step at the end of an epoch is dropped.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        accumulate: int = 1,
        ranks: tuple[int, int] = (0, 1),
    ):
        if num_samples < batch_size * accumulate * ranks[1]:
            times = f" × optim.accumulate = {accumulate}" if accumulate > 1 else ""
            raise UserError(
                f"{num_samples} images are fewer than data.batch_size = {batch_size}{times} on {ranks[1]} process(es): lower it"
            )
        self.num_samples, self.batch_size, self.seed, self.ranks = num_samples, batch_size, seed, ranks
        self.first_step, self.last_step, self.accumulate = first_step, last_step, accumulate

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self.ranks
        steps_per_epoch = self.num_samples // (self.batch_size * self.accumulate * world)
        order, order_epoch = None, -1
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
                order, order_epoch = torch.randperm(self.num_samples, generator=generator), epoch
            for part in range(self.accumulate):
                first = ((position * self.accumulate + part) * world + rank) * self.batch_size
                yield order[first : first + self.batch_size].tolist()


PURPOSES = {"order": 0, "noise": 1}


def seed_of(purpose: str, seed: int, counter: int, rank: int = 0) -> int:
    """A seed for `torch.Generator`: of an epoch's order, or of the noise of a step on one rank."""
    key = (PURPOSES[purpose], seed, counter, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
