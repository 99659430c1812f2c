"""The demo's second teacher: a small DINOv2 trained by self-distillation, without labels.

A student and its moving average see two views of each digit. The student learns to predict from one view the
output of the average for the other view (DINO, arXiv 2104.14294), and for a masked patch the output of the
average, which sees the patch (iBOT, arXiv 2111.07832). Sinkhorn-Knopp balances these targets over the
prototypes, and KoLeo spreads the images apart (both DINOv2, arXiv 2304.07193). The result is the moving average.
"""

import copy
import math

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import Dinov2Model

from miniature import models as small
from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD

TOKENS, WIDTH = 16, 64
PROTOTYPES, BOTTLENECK = 128, 32
STUDENT_TEMPERATURE, VIEW_TEMPERATURE, PATCH_TEMPERATURE = 0.1, 0.03, 0.05
MOMENTUM = 0.95  # of the moving average at the start; it rises to 1 along half a cosine
MASKED = 0.3  # mean share of masked patches; each view draws its share from 0 to twice that
# Weight of KoLeo. Without it the mean tokens collapse: effective rank 3 and linear probe .82 instead of 24 and .94
# (1200 steps, momentum .98).
SPREAD_WEIGHT = 0.5
RIDGE = 1e-3  # ridge penalty per row of the regression, for inputs of unit variance


class Head(nn.Module):
    """Computes logits (N, PROTOTYPES), the cosines between projected features (N, WIDTH) and learned prototypes.

    The batch norms remove what the features of all images have in common. In an untrained network that is most of
    a feature, and it would make the logits nearly equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.BatchNorm1d(2 * WIDTH, affine=False),
            nn.GELU(),
            nn.Linear(2 * WIDTH, BOTTLENECK),
            nn.BatchNorm1d(BOTTLENECK, affine=False),
        )
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, BOTTLENECK))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.project(features), dim=-1) @ F.normalize(self.prototypes, dim=-1).mT


def train_self_distilled(images: Tensor, steps: int) -> Dinov2Model:
    """Train a DINOv2 of the supervised teacher's size on images (N, 3, 32, 32) in [0, 1] by self-distillation.

    The mean patch token represents a whole view. The CLS token is not used later, and training with it was worse:
    after 400 steps the linear probe was .81 instead of .85. The initial weights have a standard deviation near
    1/sqrt(WIDTH) instead of DINOv2's 0.02, with which the probe was .79.
    """
    model = small.build_teacher(initializer_range=0.1)
    student = nn.ModuleDict({"model": model, "view": Head(), "patch": Head()}).train()
    average = copy.deepcopy(student).requires_grad_(False)
    gray = images.mean(1, keepdim=True)  # (N, 1, 32, 32)
    step = 0

    def loss(index: Tensor) -> Tensor:
        nonlocal step
        if step:  # the optimizer has changed the student since the last call
            update_average(average, student, momentum(step / steps))
        step += 1
        views = torch.cat([augment(gray[index]), augment(gray[index])])  # (2B, 3, 32, 32)
        masked = torch.rand(len(views), TOKENS) < 2 * MASKED * torch.rand(len(views), 1)  # (2B, 16)
        with torch.no_grad():
            seen = average["model"](views).last_hidden_state[:, 1:]  # (2B, 16, 64)
            view_targets = balance(average["view"](seen.mean(1)), VIEW_TEMPERATURE)  # (2B, K)
            patch_targets = balance(average["patch"](seen[masked]), PATCH_TEMPERATURE)  # (M, K)
        tokens = student["model"](views, bool_masked_pos=masked).last_hidden_state[:, 1:]  # (2B, 16, 64)
        mean = tokens.mean(1)  # (2B, 64)
        across = distil(student["view"](mean), view_targets.roll(len(index), 0))
        within = distil(student["patch"](tokens[masked]), patch_targets)
        return across + within + SPREAD_WEIGHT * sum(map(koleo, mean.chunk(2))) / 2

    weights, count = student.parameters(), len(images)
    small.fit("selfdistilled", weights, loss, count, steps, batch=64, peak_lr=4e-3, weight_decay=0.05)
    return average["model"].eval()


def momentum(progress: float) -> float:
    """Return the moving average's momentum at `progress` in [0, 1] (DINO, section 3.1)."""
    return 1 - (1 - MOMENTUM) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_average(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set each parameter of `average` to momentum · itself + (1 - momentum) · the student's."""
    for kept, new in zip(average.parameters(), student.parameters(), strict=True):
        kept.lerp_(new, 1 - momentum)


def balance(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Return targets (N, K) whose rows sum to 1 and whose columns have nearly equal sums (Sinkhorn-Knopp).

    Balancing the columns replaces DINO's centring; without it, the same output for every image would be optimal. A
    low temperature is DINO's sharpening; without it, a uniform output would be optimal.
    """
    targets = ((logits - logits.max()) / temperature).exp()
    for _ in range(rounds):
        targets = targets / targets.sum(0)
        targets = targets / targets.sum(1, keepdim=True)
    return targets


def distil(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy between the targets (N, K) and the student's logits (N, K)."""
    return -(targets * (logits / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()


def koleo(features: Tensor) -> Tensor:
    """Return the negative mean log distance of features (N, D), centred and normalised, to their nearest others."""
    unit = F.normalize(features - features.mean(0), dim=-1)
    nearest = (unit @ unit.mT - 2 * torch.eye(len(unit))).max(-1).values  # (N,) cosines
    return -0.5 * (2 - 2 * nearest).clamp_min(1e-6).log().mean()


def augment(gray: Tensor) -> Tensor:
    """Return random views (N, 3, 32, 32) of digits (N, 1, 32, 32), never mirrored: that would be no longer the digit."""

    def draw(size: float, *more: int) -> Tensor:
        return size * (2 * torch.rand(len(gray), *more) - 1)

    angle, scale, stretch = draw(math.radians(15)), 1 + draw(0.15), 1 + draw(0.15)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = draw(4 / 16, 2)  # up to 4 px, in units of half the width of the image
    entries = [cos * stretch, -sin, shift[:, 0], sin * stretch, cos, shift[:, 1]]
    affine = torch.stack(entries, 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(gray.shape), align_corners=False)
    view = F.grid_sample(gray, grid, align_corners=False) * (1 - 0.3 * torch.rand(len(gray), 1, 1, 1))
    view = view + 0.05 * torch.rand(len(gray), 1, 1, 1) * torch.randn_like(view)
    return small.normalise(view.expand(-1, 3, -1, -1), IMAGENET_MEAN, IMAGENET_STD)


def measure_effective_rank(features: Tensor) -> float:
    """Return exp(entropy) of the normalised spectrum of the covariance of features (N, D): 1 (they are a line) to D."""
    spectrum = torch.linalg.eigvalsh(features.double().mT.cov()).clamp_min(0)
    share = spectrum / spectrum.sum()
    return torch.special.entr(share).sum().exp().item()


def measure_detail_share(tokens: Tensor) -> float:
    """Return which share of the variance of tokens (N, L, D) lies within images, after removing each position's mean.

    0 means that all tokens of an image are equal; 1 means that the mean tokens of all images are equal.
    """
    content = tokens - tokens.mean(0)
    return ((content - content.mean(1, keepdim=True)).square().sum() / content.square().sum()).item()


def measure_spatial_detail(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Return how well tokens predict the pixels of their patches beyond what the mean token predicts, as held-out R².

    Each pair is tokens (N, 16, D) and images (N, 3, 32, 32). A first ridge regression predicts all pixels of the
    image from the mean token. A second one, the same for all positions, predicts the residual of each patch from
    its token minus the mean token; its R² is returned. Compare it only together with the linear probe. An untrained
    network, whose tokens still contain the pixels, has the highest value (.62), and a mean token that explains more
    leaves less for the second regression.
    """
    means = [tokens.mean(1) for tokens, _ in (train, val)]  # (N, D)
    pixels = [_patches(images) for _, images in (train, val)]  # (N, 16, 64)
    painted = _ridge(means[0], pixels[0].flatten(1), means)  # two of (N, 1024)
    left = [(y.flatten(1) - p).view_as(y) for y, p in zip(pixels, painted, strict=True)]  # (N, 16, 64)
    details = [tokens - tokens.mean(1, keepdim=True) for tokens, _ in (train, val)]
    offset = details[0].mean(0)  # the part that depends only on the position
    flat = [(detail - offset).flatten(0, 1) for detail in details]  # (16 N, D)
    explained = _ridge(flat[0], left[0].flatten(0, 1), flat)[1]
    rest = left[1].flatten(0, 1)
    return (1 - (rest - explained).square().sum() / rest.square().sum()).item()


def _patches(images: Tensor) -> Tensor:
    """Return the gray pixels (N, 16, 64) of all patches."""
    return F.unfold(images.mean(1, keepdim=True), small.PATCH, stride=small.PATCH).mT


def _ridge(x: Tensor, y: Tensor, inputs: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Fit a ridge regression of y (N, E) on x (N, D) in double precision; return its predictions for each of `inputs`."""
    ridge = make_pipeline(StandardScaler(), Ridge(RIDGE * len(x)))
    ridge.fit(x.double().numpy(), y.double().numpy())
    return [torch.from_numpy(ridge.predict(other.double().numpy())).float() for other in inputs]
