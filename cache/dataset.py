"""A dataset that joins cached latents, teacher tokens and text embeddings."""

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache.image_list import Sample, clip_shape, is_captioned, read_samples
from cache.manifest import check_crops
from cache.reader import FieldReader
from cache.text import TextReader
from common.errors import UserError
from common.sides import height_width


class AlignedDataset(Dataset):
    """An item for each image or clip: `latent (C, [f,] h, w)`, `dino_tokens ([f·]N, D)`, text fields such as `prompt_embeds`,
    and its label.

    Items are for any DataLoader; training calls `read_batch` instead, which reads stored bytes and is several times faster.
    Where script 2 stored them, `size_and_crop (6,)` too (`cache.views.size_and_crop`).
    Latents and tokens are joined by id. An image of the CSV that either cache lacks is left out; `left_out` is the number of
    such images. `labels (n,)` are the labels of the text: the classes of a list of classes, which items call `class_id`, or the
    numbers of the prompts of a captioned list, which items call `label`. The dataset works with any start method of processes.

    Raises `UserError` when a field is missing, is unfinished or does not fit the others.
    """

    def __init__(
        self,
        csv_path: str | Path,  # the CSV of script 1
        latents: str | Path,  # the folder of script 2
        tokens: str | Path | None,  # that of script 3; without it items have no tokens
        text: str | Path,  # that of script 4
        *,
        need_tokens: bool = True,  # False: tokens are not read (for a run with λ = 0, which does not align)
    ):
        self.latents = FieldReader(latents, "latents")
        self.tokens = None if tokens is None else FieldReader(tokens, "tokens")
        if self.tokens is not None:
            check_crops(
                self.latents.folder, self.latents.spec.view, self.tokens.folder, self.tokens.spec.view
            )
        self.text = TextReader(text)
        listed = read_samples(csv_path)
        self._check_frames(clip_shape(listed), csv_path)
        cached = set(self.latents.ids)
        if self.tokens is not None:
            cached &= set(self.tokens.ids)
        samples = [sample for sample in listed if sample.id in cached]
        self.left_out = len(listed) - len(samples)
        if not samples:
            where = " and ".join(str(folder) for folder in (latents, tokens) if folder is not None)
            raise UserError(f"none of the images of {csv_path} is in {where}: check the paths")
        self.ids = [sample.id for sample in samples]
        self.captioned = is_captioned(samples)
        self.labels = torch.tensor(self._find_labels(samples, csv_path))  # (n,)
        self.readers = {"latent": self.latents}
        if need_tokens and self.tokens is not None:
            self.readers["dino_tokens"] = self.tokens
        self._rows = {name: reader.rows(self.ids) for name, reader in self.readers.items()}

    def _check_frames(self, clip: tuple[int, float] | None, csv_path: str | Path) -> None:
        """Raise `UserError` unless both fields are of the frames that the list names, and of none where it lists images."""
        for reader in filter(None, (self.latents, self.tokens)):
            view = reader.spec.view or {}
            if (found := (view["frames"], view["fps"]) if "frames" in view else None) != clip:
                kinds = [
                    "images" if of is None else f"clips of {of[0]} frames at {of[1]:g} a second"
                    for of in (found, clip)
                ]
                raise UserError(
                    f"{reader.folder} is of {kinds[0]}, and {csv_path} lists {kinds[1]}: check the paths"
                )
        latent_frames = self.latents.spec.shape[1]
        if clip and self.tokens and (found := self.tokens.spec.view["latent_frames"]) != latent_frames:
            raise UserError(
                f"{self.tokens.folder} has tokens of {found} latent frames, and {self.latents.folder} has {latent_frames}: "
                "make the tokens with script 3 and the VAE's own --frames-per-latent"
            )

    def read_text_with_batches(self) -> None:
        """Let `read_batch` also read the text, for a training that does not hold the text of all prompts."""
        self.readers["text"], self._rows["text"] = self.text.reader, self.text.rows_of(self.labels)

    def _find_labels(self, samples: Sequence[Sample], csv_path: str | Path) -> list[int]:
        """Return the label of each image; raises `UserError` for a class or a prompt that the text lacks."""
        if self.captioned:
            label_of = self.text.label_of
            if lacking := next((s for s in samples if s.prompt not in label_of), None):
                raise UserError(
                    f"{self.text.folder} lacks the prompt of {lacking.id} ({lacking.prompt!r:.60}): run script 4 with --csv "
                    f"{csv_path}"
                )
            return [label_of[sample.prompt] for sample in samples]
        if (most := max(sample.class_id for sample in samples)) >= self.text.n_classes:
            lacks = f"{self.text.folder} only {self.text.n_classes} classes"
            raise UserError(f"{csv_path} has class {most}, {lacks}: run script 4 again")
        return [sample.class_id for sample in samples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        # Each item has its own memory: a new block for the whole batch causes page faults, and the allocator keeps it.
        sizes = self.value_bytes.items()
        raw = {n: [torch.empty(size, dtype=torch.uint8) for _ in indices] for n, size in sizes if n != "text"}
        for name in raw:
            self.readers[name].read_rows(self._rows[name][indices], [item.numpy() for item in raw[name]])
        items, decode = [], self.decode
        for i, label in enumerate(self.labels[indices]):
            values = {name: decode[name](raw[name][i][None]) for name in raw}
            values["latent"] = self.x_0(values["latent"])  # (1, C, h, w)
            if (told := self.size_and_crop(raw["latent"][i][None])) is not None:
                values["size_and_crop"] = told
            item = {name: value[0] for name, value in (values | self.text.fields_of([label])).items()}
            items.append(item | {"label" if self.captioned else "class_id": label})
        return items

    @property
    def value_bytes(self) -> dict[str, int]:
        """The number of stored bytes of one value, for each field."""
        return {name: reader.spec.value_bytes for name, reader in self.readers.items()}

    @property
    def decode(self) -> dict[str, Callable[[Tensor], Tensor | dict[str, Tensor]]]:
        """For each field the function that decodes stored bytes `(n, value_bytes)` to values `(n, *shape)`, on any device.

        Text is decoded to a dict.
        """
        return {name: reader.spec.decode for name, reader in self.readers.items()}

    @property
    def identity(self) -> dict[str, int]:
        """The number of images and the CRC-32 of their ids and classes or prompts, on which a training depends."""
        labels = self.labels.tolist()
        shown = [self.text.prompts[label] for label in labels] if self.captioned else labels
        lines = "".join(f"{key},{label}\n" for key, label in zip(self.ids, shown, strict=True))
        return {"images": len(self.ids), "crc32": zlib.crc32(lines.encode())}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape `(C, h, w)` of an item's `latent`."""
        return latent_shape(self.latents.spec.shape, self.latents.spec.details)

    @property
    def frames(self) -> int:
        """The latent frames of a clip, of each of which there are tokens; 1 of images."""
        return self.latent_shape[1] if len(self.latent_shape) == 4 else 1

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """The grid (h, w) of the cached teacher tokens, of each frame of a clip; None if there are none."""
        if self.tokens is None:
            return None
        return height_width(
            (self.tokens.spec.view or {}).get("grid") or math.isqrt(self.tokens.spec.shape[0])
        )

    def read_batch(self, indices: Sequence[int], raw: dict[str, Tensor]) -> None:
        """Fill `raw[name] (len(indices), value_bytes)` with the stored bytes of these items, for every field."""
        for name, reader in self.readers.items():
            reader.read_rows(self._rows[name][indices], raw[name].numpy())

    def size_and_crop(self, raw: Tensor) -> Tensor | None:
        """Return size and crop `(B, 6)`, in fp32, of the images of bytes of latents; None where script 2 stored none."""
        return self.latents.spec.size_and_crop(raw)

    def x_0(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return `latents_of` this dataset's stored values."""
        return latents_of(stored, self.latents.spec.details, generator)


def latent_shape(stored: Sequence[int], details: dict) -> tuple[int, ...]:
    """Return the shape `(C, h, w)` of a latent. Where script 2 stored mean and deviation, that is half the stored channels."""
    channels, *size = stored
    return (channels // 2 if details["posterior"] == "moments" else channels, *size)


def latents_of(stored: Tensor, details: dict, generator: torch.Generator | None = None) -> Tensor:
    """Return the scaled latents `(B, C, h, w)` in fp32 that a network is trained on, from script 2's values and details.

    Where it stored moments, `generator` draws the latents; without a generator the mean is returned.
    """
    latents = stored.float()
    if details["posterior"] == "moments":
        mean, std = latents.chunk(2, dim=1)  # (B, C, h, w) each
        latents = mean
        if generator is not None:
            latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
    if details["scaled"]:
        return latents
    mean, scale = (
        torch.as_tensor(details.get(key, 0.0), dtype=torch.float32, device=latents.device).view(
            -1, *[1] * (latents.ndim - 2)
        )
        for key in ("mean", "scaling_factor")
    )  # (C, 1, …) or (1, 1, …)
    return (latents - mean) * scale
