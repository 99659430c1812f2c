"""From a batch of stored bytes to what a training step needs, on the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.batch_stream import Batch
from cache.dataset import AlignedDataset
from cache.text import drop_captions


@dataclass(frozen=True)
class TrainingBatch:
    """x_0 `(B, C, h, w)` in fp32, the text fields `(B, …)`, and the teacher's tokens `(B, N, D)` on their `grid` (h, w), both
    None where they were not asked for."""

    x_0: Tensor
    text: dict[str, Tensor]
    tokens: Tensor | None
    grid: tuple[int, int] | None


class TrainingBatches:
    """Makes batches ready for a step. The text of all classes stays on the device, so that none travels with an image.

    Args:
        dataset: the cached fields.
        device, dtype: where the step computes, and the precision of its text.
        caption_dropout: share of captions that the null prompt replaces, for classifier-free guidance.
        teacher: makes tokens `(B, N, D)` of x_0 where none are cached; None reads the cached ones.
        grid: the grid (h, w) of that teacher's tokens.
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
        """The batch on the device; `generator` draws latents from stored moments, then drops captions."""
        x_0 = self.dataset.x_0(batch.on(self.device, "latent"), generator)  # (B, C, h, w)
        text = self.text.rows(self.class_ids[batch.rows(self.device)])
        text = drop_captions(text, self.text.null, self.dropout, generator)
        if not with_tokens:
            return TrainingBatch(x_0, text, None, None)
        tokens = batch.on(self.device, "dino_tokens") if self.teacher is None else self.teacher(x_0)
        return TrainingBatch(x_0, text, tokens, self.grid)
