"""Turn a batch of stored bytes into the tensors that a training step needs, on the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.batch_stream import Batch
from cache.dataset import AlignedDataset
from cache.text import drop_captions


@dataclass(frozen=True)
class TrainingBatch:
    """The tensors of one training batch.

    Attributes:
        x_0: scaled latents `(B, C, h, w)` in fp32.
        text: the text fields, each `(B, …)`.
        tokens: the teacher's tokens `(B, N, D)`; None where they were not requested.
        grid: the grid (h, w) of the tokens; None where they were not requested.
    """

    x_0: Tensor
    text: dict[str, Tensor]
    tokens: Tensor | None
    grid: tuple[int, int] | None


class TrainingBatches:
    """Makes a `TrainingBatch` of each `Batch`.

    The text of all classes stays on the device, so that no text needs to be copied with the images.

    Args:
        dataset: the cached fields.
        device, dtype: the device of the step, and the precision of the text fields.
        caption_dropout: the share of captions that are replaced by the null prompt, for classifier-free guidance.
        teacher: computes tokens `(B, N, D)` from x_0, for runs without cached tokens; None uses the cached ones.
        grid: the grid (h, w) of the tokens of `teacher`.
    """

    def __init__(
        self,
        dataset: AlignedDataset,
        device: torch.device,
        dtype: torch.dtype,
        *,
        caption_dropout: float,
        teacher: Callable[[Tensor], Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ):
        self.dataset, self.device, self.dropout, self.teacher = dataset, device, caption_dropout, teacher
        self.text = dataset.text.to(device, dtype)
        self.class_ids = dataset.class_ids.to(device)  # (n,)
        self.grid = dataset.token_grid if teacher is None else grid

    def __call__(self, batch: Batch, generator: torch.Generator, *, with_tokens: bool) -> TrainingBatch:
        """Move the batch to the device and decode it.

        `generator` first draws the latents (where the cache holds moments) and then chooses the captions to drop.
        """
        x_0 = self.dataset.x_0(batch.on(self.device, "latent"), generator)  # (B, C, h, w)
        text = self.text.rows(self.class_ids[batch.rows(self.device)])
        text = drop_captions(text, self.text.null, self.dropout, generator)
        if not with_tokens:
            return TrainingBatch(x_0, text, None, None)
        tokens = batch.on(self.device, "dino_tokens") if self.teacher is None else self.teacher(x_0)
        return TrainingBatch(x_0, text, tokens, self.grid)
