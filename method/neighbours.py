"""Alignment across the frames of a clip: CREPA (Hwang et al., arXiv 2506.09229).

Frame i of the student is compared with frame i of the teacher, and with the teacher's frames k near it:

    loss_i = (1 − s_ii) + Σ_k exp(−|i − k| / τ) (1 − s_ik)

s_ik is the cosine of tokens at the same place, averaged over places and clips. The paper's loss is −Σ (s_ii + Σ_k …): the same
gradient, and a constant less. Frames outside the clip do not count; repeating the first and last frame for them, as some do,
would pull the ends of a clip to a standstill.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Compares the tokens of clips frame by frame; the fields are knobs of the config's section `align`."""

    neighbours: int = 0  # d: a frame's neighbours are d frames away; 0 means that it has none
    cumulative: bool = False  # 1, 2, …, d frames away
    neighbour_tau: float = 1.0  # τ, in frames of the latents
    normalize_by_frames: bool = True  # the mean over frames, else the sum
    normalize_neighbours: bool = False  # divide loss_i by the sum of its weights
    spatial: bool = True  # compare place by place, else the frames' mean tokens

    def offsets(self) -> dict[int, float]:
        """The weight of each offset k − i."""
        first = 1 if self.cumulative else self.neighbours
        near = range(first, self.neighbours + 1) if self.neighbours else ()
        return {0: 1.0} | {o: math.exp(-abs(o) / self.neighbour_tau) for n in near for o in (-n, n)}

    def __call__(self, x_tokens: Tensor, y_tokens: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Return the loss of tokens `(B, f·N, D)` of `frames` = f, and their similarity, in their own precision.

        The similarity is the mean over frames of the weighted mean of s_ik: in [−1, 1], whatever the loss is divided by.
        """
        x, y = (tokens.unflatten(1, (frames, -1)) for tokens in (x_tokens, y_tokens))  # (B, f, N, D)
        if not self.spatial:
            x, y = x.mean(2, keepdim=True), y.mean(2, keepdim=True)  # (B, f, 1, D)
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        similar, weights = x.new_zeros(frames), x.new_zeros(frames)
        for offset, weight in self.offsets().items():
            first, last = (
                max(0, -offset),
                frames - max(0, offset),
            )  # of the frames i that have a frame i + offset
            if first >= last:
                continue
            there = y[:, first + offset : last + offset]
            cosine = (x[:, first:last] * there).sum(-1).mean((0, 2))  # (last − first,)
            around = (first, frames - last)
            similar = similar + weight * F.pad(cosine, around)
            weights = weights + weight * F.pad(torch.ones_like(cosine), around)
        similarity = (similar / weights).mean()
        each = 1 - similar / weights if self.normalize_neighbours else weights - similar  # (f,)
        return each.mean() if self.normalize_by_frames else each.sum(), similarity
