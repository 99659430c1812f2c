"""What alignment is, with nothing about diffusion: the head that projects tapped features, and the losses.

Tokens are `(B, N, D)`. The losses take the head's tokens x and the teacher's tokens y, insist on equal shapes, compute in fp32
also under autocast, and return a scalar.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlignHead(nn.Module):
    """Project tapped features to the teacher's width, then upsample to its grid (U-REPA, arXiv 2503.18414).

    The order matters: the 1×1 projection runs on the U-Net's own cells, and only its output is resized.

    Args:
        in_ch: channels of the tapped features.
        D: width of the teacher's tokens, a multiple of 32 (GroupNorm).
        grid: the teacher's token grid, (h, w) or one number for both.
    """

    def __init__(self, in_ch: int, D: int, grid: int | tuple[int, int]):
        super().__init__()
        if D % 32:
            raise ValueError(f"D = {D} must be a multiple of 32, the number of GroupNorm's groups")
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        self.proj = nn.Sequential(nn.Conv2d(in_ch, D, 1, bias=False), nn.GroupNorm(32, D), nn.GELU())

    def forward(self, feat: Tensor) -> Tensor:
        """Map features `(B, in_ch, h, w)` to L2-normalised tokens `(B, N, D)`, row by row over the teacher's grid."""
        x = self.proj(feat)  # (B, D, h, w)
        if (
            self.grid[0] < x.shape[2] or self.grid[1] < x.shape[3]
        ):  # down-sampling would skip cells, as a CLS vector does
            raise ValueError(
                f"the teacher's grid {self.grid} is coarser than the features' {tuple(x.shape[2:])}"
            )
        if x.shape[2:] != self.grid:
            x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)  # (B, D, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        return F.normalize(x.float(), dim=-1)


def _in_fp32(loss):
    """Check both token tensors at the door and compute in fp32, autocast or not."""

    @functools.wraps(loss)
    def checked(x_tokens: Tensor, y_tokens: Tensor, *args, **kwargs) -> Tensor:
        if x_tokens.shape != y_tokens.shape or x_tokens.ndim != 3:
            raise ValueError(
                f"tokens must be two equal (B, N, D), got {tuple(x_tokens.shape)} and {tuple(y_tokens.shape)}"
            )
        if x_tokens.shape[1] == 1:
            raise ValueError(
                "one token per image: a CLS vector is not a token grid, and its manifold loss would be 0"
            )
        with torch.autocast(x_tokens.device.type, enabled=False):
            return loss(x_tokens.float(), y_tokens.float(), *args, **kwargs)

    return checked


@_in_fp32
def token_loss(x_tokens: Tensor, y_tokens: Tensor) -> Tensor:
    """1 − cosine similarity of corresponding tokens, averaged over images and tokens; in [0, 2]."""
    return 1 - F.cosine_similarity(x_tokens, y_tokens, dim=-1).mean()


@_in_fp32
def manifold_gram_loss(x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False) -> Tensor:
    """Mean squared difference of the two B×B Gram matrices of normalised mean-pooled tokens ("sample Gram").

    `upper_only` averages over pairs i < j instead of all B² entries, whose diagonal is 0 and whose halves are equal.
    Raises ValueError for B = 1, where there is no pair.
    """
    if len(x_tokens) < 2:
        raise ValueError("the sample Gram needs at least two images in the batch")
    pooled_x = F.normalize(x_tokens.mean(1), dim=-1)  # (B, D)
    pooled_y = F.normalize(y_tokens.mean(1), dim=-1)  # (B, D)
    return _gram_distance(pooled_x @ pooled_x.T, pooled_y @ pooled_y.T, upper_only)


@_in_fp32
def token_gram_loss(x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False) -> Tensor:
    """Mean squared difference of the N×N Gram matrices within each image ("token Gram", U-REPA's manifold loss)."""
    x, y = F.normalize(x_tokens, dim=-1), F.normalize(y_tokens, dim=-1)
    return _gram_distance(x @ x.transpose(1, 2), y @ y.transpose(1, 2), upper_only)


def both_grams_loss(x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False) -> Tensor:
    """Sample Gram plus token Gram."""
    return manifold_gram_loss(x_tokens, y_tokens, upper_only) + token_gram_loss(
        x_tokens, y_tokens, upper_only
    )


MANIFOLD_LOSSES = {"sample": manifold_gram_loss, "token": token_gram_loss, "both": both_grams_loss}


def _gram_distance(gram_x: Tensor, gram_y: Tensor, upper_only: bool) -> Tensor:
    squared = (gram_x - gram_y).square()  # (..., n, n)
    if not upper_only:
        return squared.mean()
    row, column = torch.triu_indices(*squared.shape[-2:], offset=1, device=squared.device)
    return squared[..., row, column].mean()
