"""The alignment, without anything about diffusion: the heads that project tapped features, and the losses.

Tokens are `(B, N, D)`. The losses take the head's tokens x and the teacher's tokens y, which must have equal shapes. They
compute in fp32, even under autocast, and return a scalar.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

from method.neighbours import Neighbours

GROUPS = 32  # of the GroupNorm in the head conv1x1
OWN_FRAMES = Neighbours()
ROWS = 2048  # of a matrix of relations that are held at a time


class PerCell(nn.Sequential):
    """Applies layers to the channels of each cell separately; maps features `(B, C, h, w)` to features of the same grid."""

    def forward(self, feat: Tensor) -> Tensor:
        return super().forward(feat.movedim(1, -1)).movedim(-1, 1)


# From (channels C of the features, width D of the teacher, hidden width) to the projection (B, C, h, w) -> (B, D, h, w).
PROJECTIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    # U-REPA in the version of the plan
    "conv1x1": lambda C, D, _: nn.Sequential(
        nn.Conv2d(C, D, 1, bias=False), nn.GroupNorm(GROUPS, D), nn.GELU()
    ),
    "linear": lambda C, D, _: PerCell(nn.LayerNorm(C), nn.Linear(C, D)),
    # REPA, arXiv 2410.06940
    "mlp": lambda C, D, width: PerCell(
        nn.Linear(C, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, D)
    ),
    # iREPA, arXiv 2512.10794
    "conv3x3": lambda C, D, _: nn.Conv2d(C, D, 3, padding=1),
}


class AlignHead(nn.Module):
    """Project tapped features to the teacher's width, then bring them to its grid (U-REPA, arXiv 2503.18414).

    The order matters: the projection runs on the backbone's own cells, and only its output is resized.

    Args:
        in_ch: channels of the tapped features.
        D: width of the teacher's tokens, for conv1x1 a multiple of 32 (GroupNorm).
        kind: which of `PROJECTIONS`.
        hidden: width of the two hidden layers of `mlp`.
    """

    def __init__(self, in_ch: int, D: int, kind: str = "conv1x1", hidden: int = 2048):
        super().__init__()
        if kind == "conv1x1" and D % GROUPS:
            raise ValueError(f"D = {D} must be a multiple of {GROUPS}, the number of GroupNorm's groups")
        self.proj = PROJECTIONS[kind](in_ch, D, hidden)

    def forward(self, feat: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Map features `(B, in_ch, h, w)` to L2-normalised tokens `(B, N, D)`, row by row over the teacher's `grid` (H, W).

        For clips, `(B, in_ch, f, h, w)`, each frame is mapped like an image, and the result is `(B, f·N, D)`, frame by frame.
        Raises ValueError where a grid (f, H, W) has another number of frames: they are never resized.
        """
        *frames, height, width = grid
        if frames and frames != [*feat.shape[2:-2]]:
            raise ValueError(f"features {tuple(feat.shape)} do not have the {frames[0]} frames of the grid")
        if feat.ndim == 5:
            images = self(feat.transpose(1, 2).flatten(0, 1), (height, width))  # (B·f, N, D)
            return images.unflatten(0, (len(feat), -1)).flatten(1, 2)
        # The hidden states of some backbones have another precision than their weights.
        x = self.proj(feat.to(next(self.proj.parameters()).dtype))  # (B, D, h, w)
        x = resize_cells(x, grid).flatten(2).transpose(1, 2)  # (B, N, D)
        return F.normalize(x.float(), dim=-1)


def resize_cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize `(B, D, h, w)` to `grid` (H, W): average areas where it is coarser, interpolate bilinearly where it is finer.

    Bilinear interpolation to a coarser grid would skip cells; averages use them all. Returns fp32: in bf16 the gradient of a
    cell, a sum over all that it reaches, would lose more than the rest of the backward pass does.
    """
    x = x.float()
    coarser = tuple(min(wanted, found) for wanted, found in zip(grid, x.shape[2:], strict=True))
    if coarser != x.shape[2:]:
        x = F.adaptive_avg_pool2d(x, coarser)
    if x.shape[2:] != tuple(grid):
        x = F.interpolate(x, tuple(grid), mode="bilinear", align_corners=False)
    return x


def _in_fp32(loss):
    """Wrap a loss so that it checks the shapes of both token tensors and computes in fp32, even under autocast."""

    @functools.wraps(loss)
    def checked(x_tokens: Tensor, y_tokens: Tensor, *args, **kwargs) -> Tensor:
        found = tuple(x_tokens.shape), tuple(y_tokens.shape)
        if found[0] != found[1] or len(found[0]) != 3:
            raise ValueError(f"tokens must be two equal (B, N, D), got {found[0]} and {found[1]}")
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
def neighbour_loss(
    x_tokens: Tensor, y_tokens: Tensor, frames: int, neighbours: Neighbours
) -> tuple[Tensor, Tensor]:
    """The loss and the similarity of clips' tokens `(B, f·N, D)` by `Neighbours`; raises ValueError for N = 1."""
    if x_tokens.shape[1] == frames:
        raise ValueError("one token per frame: a CLS vector is not a token grid")
    return neighbours(x_tokens, y_tokens, frames)


@_in_fp32
def manifold_gram_loss(
    x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False, gather: bool = False
) -> Tensor:
    """Mean squared difference of the two B×B Gram matrices of normalised mean-pooled tokens ("sample Gram").

    `upper_only` averages over pairs i < j instead of all B² entries, of which the diagonal is 0 and the two halves are equal.
    `gather` joins the batches of all ranks, with gradients. Every rank then has the same loss, and the mean of the ranks'
    gradients, which DistributedDataParallel would also compute, is the gradient of one process with the whole batch.
    Raises ValueError for B = 1, where there is no pair.
    """
    pooled_x = F.normalize(x_tokens.mean(1), dim=-1)  # (B, D)
    pooled_y = F.normalize(y_tokens.mean(1), dim=-1)  # (B, D)
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        pooled_x, pooled_y = (torch.cat(all_gather(x)) for x in (pooled_x, pooled_y))  # (ranks · B, D)
    if len(pooled_x) < 2:
        raise ValueError("the sample Gram needs at least two images in the batch")
    return _gram_distance(pooled_x @ pooled_x.T, pooled_y @ pooled_y.T, upper_only)


@_in_fp32
def token_gram_loss(x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False) -> Tensor:
    """Mean squared difference of the N×N Gram matrices within each image ("token Gram", U-REPA's manifold loss)."""
    x, y = F.normalize(x_tokens, dim=-1), F.normalize(y_tokens, dim=-1)
    return _gram_distance(x @ x.transpose(1, 2), y @ y.transpose(1, 2), upper_only)


@_in_fp32
def relation_loss(
    x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False, margin: float = 0.1
) -> Tensor:
    """VideoREPA's token relation distillation (arXiv 2505.23656): the mean of relu(|x_i·x_j − y_i·y_j| − margin).

    i and j run over all tokens of an image, or of all frames of a clip: relations in space and in time. Differences below the
    margin cost nothing; 0.1 is that of the authors' training scripts. The matrix of a clip may have 10^9 entries, so a few of
    its rows are held at a time, and computed again in backward.
    """
    x, y = F.normalize(x_tokens, dim=-1), F.normalize(y_tokens, dim=-1)
    B, n, _ = x.shape

    def beyond(start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        over = F.relu((x[:, rows] @ x.mT - y[:, rows] @ y.mT).abs() - margin)  # (B, ROWS, n)
        return (over.triu(start + 1) if upper_only else over).sum()

    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = [again(beyond, start) if n > ROWS else beyond(start) for start in range(0, n, ROWS)]
    return torch.stack(parts).sum() / (B * (n * (n - 1) / 2 if upper_only else n**2))


def both_grams_loss(
    x_tokens: Tensor, y_tokens: Tensor, upper_only: bool = False, gather: bool = False
) -> Tensor:
    """Return the sum of the sample Gram loss and the token Gram loss."""
    sample = manifold_gram_loss(x_tokens, y_tokens, upper_only, gather)
    return sample + token_gram_loss(x_tokens, y_tokens, upper_only)


# Functions of (x, y, upper_only, gather, margin) that return a scalar; the Gram within an image needs no other ranks.
MANIFOLD_LOSSES = {
    "sample": lambda x, y, upper_only, gather, _: manifold_gram_loss(x, y, upper_only, gather),
    "token": lambda x, y, upper_only, *_: token_gram_loss(x, y, upper_only),
    "both": lambda x, y, upper_only, gather, _: both_grams_loss(x, y, upper_only, gather),
    "relation": lambda x, y, upper_only, _, margin: relation_loss(x, y, upper_only, margin),
}
OVER_THE_BATCH = {"sample", "both"}  # those that compare the images of a batch with each other


def _gram_distance(gram_x: Tensor, gram_y: Tensor, upper_only: bool) -> Tensor:
    squared = (gram_x - gram_y).square()  # (..., n, n)
    if not upper_only:
        return squared.mean()
    row, column = torch.triu_indices(*squared.shape[-2:], offset=1, device=squared.device)
    return squared[..., row, column].mean()


def spatial_norm(tokens: Tensor, alpha: float) -> Tensor:
    """iREPA's normalisation of teacher tokens `(…, N, D)`: (y − α·mean) / (std + 1e-6) per image and channel, over its tokens.

    It removes what all tokens of an image share, so that their differences weigh more (arXiv 2512.10794). α = 1 removes the
    whole mean, and the mean is all that the sample Gram compares.
    """
    tokens = tokens.float()
    mean, std = tokens.mean(-2, keepdim=True), tokens.std(-2, keepdim=True)  # (…, 1, D)
    return (tokens - alpha * mean) / (std + 1e-6)


@dataclass(frozen=True, kw_only=True)
class AlignmentLoss:
    """Computes L_token + w · L_manifold, each averaged over the taps."""

    manifold_coeff: float = 3.0  # w; 0 means that the manifold loss is not computed
    manifold: str = "sample"  # which of `MANIFOLD_LOSSES`
    upper_only: bool = False  # see `manifold_gram_loss`
    gather: bool = False
    relation_margin: float = 0.1  # see `relation_loss`
    spatial_norm: float | None = None  # α of `spatial_norm` on the teacher's tokens; None: as they are
    neighbours: Neighbours = OWN_FRAMES  # how the frames of clips are compared

    def __call__(
        self, tokens: Mapping[str, Tensor], teacher: Tensor, grid: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss from the tokens `(B, N, D)` of each tap and those of the teacher.

        Tokens of clips are `(B, f·N, D)`, and `grid` is then (f, h, w). Returns `loss_token`, `loss_manifold`, `loss_align`,
        and for each tap `cosine/TAP` in [−1, 1], which with neighbours is the similarity of `Neighbours`, and, unless w is
        0, `loss_manifold/TAP`.
        """
        if grid is not None and math.prod(grid) != teacher.shape[1]:
            raise ValueError(f"{teacher.shape[1]} tokens do not lie on a grid {tuple(grid)}")
        frames = grid[0] if grid is not None and len(grid) == 3 else 1
        if self.spatial_norm is not None:
            images = teacher.unflatten(1, (frames, -1))  # (B, f, N, D)
            teacher = spatial_norm(images, self.spatial_norm).flatten(1, 2)
        token, cosine = {}, {}
        for tap, x in tokens.items():
            if frames == 1 and self.neighbours.spatial:
                token[tap] = token_loss(x, teacher)
                cosine[tap] = 1 - token[tap]
            else:
                token[tap], cosine[tap] = neighbour_loss(x, teacher, frames, self.neighbours)
        loss_token = torch.stack(list(token.values())).mean()
        loss_manifold, manifold = loss_token.new_zeros(()), {}
        if self.manifold_coeff > 0:
            gram_loss = MANIFOLD_LOSSES[self.manifold]
            options = self.upper_only, self.gather, self.relation_margin
            manifold = {tap: gram_loss(x, teacher, *options) for tap, x in tokens.items()}
            loss_manifold = torch.stack(list(manifold.values())).mean()
        terms = {
            "loss_token": loss_token,
            "loss_manifold": loss_manifold,
            "loss_align": loss_token + self.manifold_coeff * loss_manifold,
        }
        return (
            terms
            | {f"cosine/{tap}": value for tap, value in cosine.items()}
            | {f"loss_manifold/{tap}": value for tap, value in manifold.items()}
        )


def similarity_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The mean over taps of `cosine/TAP`: what a cutoff watches, in [−1, 1] also where the loss sums over neighbours."""
    return torch.stack([value for name, value in terms.items() if name.startswith("cosine/")]).mean()
