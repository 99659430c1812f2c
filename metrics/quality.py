"""Metrics of sets of images, computed from their features; each follows the definition that was published under its name.

Inception Score, precision and recall as ADM's evaluator has them, KID as torch-fidelity. Values of different protocols or
different numbers of images are different measures, so both are part of a name: `adm_fid10k`, never a bare "FID".
"""

import re
from collections.abc import Sequence

import numpy as np
import torch

from common.errors import UserError
from metrics.features import FeatureSet, full_precision
from metrics.moments import Moments, frechet_distance, trace_of_root
from metrics.reference import Reference

METRICS = {  # of each protocol
    "adm": ("fid", "sfid", "is", "precision", "recall", "kid"),
    "clean": ("fid", "kid"),
    "classifier": ("fd", "is", "precision", "recall", "kid", "accuracy"),
    "dinov2": ("fd", "kid"),
}
BOOTSTRAP = 10  # resamples: the spread is then known to about a quarter of itself
ROWS = 2000  # rows of a distance matrix at a time: 80 MB against 10k images


def score(
    drawn: FeatureSet,
    reference: Reference,
    *,
    n: int,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    intended: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, dict]:
    """All metrics of the reference's protocol: {name: {value, error, error_kind, notes}}.

    `n` is the number of images asked for, `intended` (n,) the class each was asked to show (for the accuracy). `error` is of
    the kind "bootstrap" (standard error, 0 resamples leave it out), "splits" or "subsets" (standard deviation over the
    Inception Score's splits, KID's subsets), or None. `notes` are what a reader must know to read the value. Metrics for
    which the reference lacks features or spatial moments are left out.
    """
    if len(drawn) != n:
        raise ValueError(f"{n} images were asked for, there are features of {len(drawn)}")
    pool, protocol, kept = drawn.pool, reference.protocol, reference.features
    whole = Moments().update(pool)
    for ours, theirs in ((whole, reference.pool), (drawn.spatial, reference.spatial)):
        if ours is not None and theirs is not None and theirs.dim != ours.dim:
            given = f"features of an image, the extractor gives {ours.dim}"
            raise UserError(f"{reference.name} has {theirs.dim} {given}: make it anew")
    results: dict[str, dict] = {}

    def put(metric: str, value: float, error: float | None = None, kind: str | None = None, note: str = ""):
        name, kind = metric_name(protocol, metric, n), None if error is None else kind
        results[name] = {"value": value, "error": error, "error_kind": kind, "notes": [note] if note else []}

    for metric in METRICS[protocol]:
        if metric in ("fid", "fd"):
            error = bootstrap_fd(pool, reference.pool, bootstrap, seed) if bootstrap else None
            put(metric, frechet_distance(whole, reference.pool), error, "bootstrap")
        elif metric == "sfid" and reference.spatial is not None and drawn.spatial is not None:
            dim = reference.spatial.dim
            few = f"{n} images for {dim} dimensions: a covariance needs more images than that"
            distance = frechet_distance(drawn.spatial, reference.spatial)
            put(metric, distance, note=few if n <= dim else "")
        elif metric == "is" and drawn.logits is not None:
            mean, error = inception_score(drawn.logits)
            put(metric, mean, error, "splits", "one split" if error is None else "")
        elif metric == "kid" and kept is not None:
            size = min(1000, n, len(kept))
            put(metric, *kid(pool, kept), "subsets", f"subsets of {size}, not 1000" if size < 1000 else "")
        elif metric == "precision" and kept is not None:
            both = precision_recall(pool, kept, device=device)
            for name, value in zip(("precision", "recall"), both, strict=True):
                put(name, value, note=f"against {len(kept)} real images")
        elif metric == "accuracy" and intended is not None:
            put(metric, class_accuracy(drawn.labels, intended))
    return results


def metric_name(protocol: str, metric: str, n: int) -> str:
    """`adm_fid10k`, `classifier_fd300`: whole thousands of images are written with a k."""
    return f"{protocol}_{metric}{f'{n // 1000}k' if n % 1000 == 0 else n}"


def bootstrap_fd(pool: np.ndarray, reference: Moments, resamples: int = BOOTSTRAP, seed: int = 0) -> float:
    """Bootstrap standard error of the Fréchet distance.

    Resamples `pool` (N, D) with replacement. Only the spread of these distances is meaningful: their mean is too large, since a
    resample holds only 63 % of the images. The reference is taken as exact. Holds three float64 copies of `pool`.
    """
    if resamples < 2:
        raise ValueError(f"a spread needs 2 resamples, got {resamples}")
    rng = np.random.default_rng(seed)
    centred = pool - reference.mean  # (N, D) float64
    turned = centred @ reference.root  # (N, D), of the covariance Rᵀ S R, whose eigenvalues a distance needs
    squares = (centred**2).sum(axis=1)  # (N,)
    n, trace = len(pool), np.trace(reference.cov)
    distances = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n)  # (N,), how often each image was drawn
        drawn = times > 0
        weights = times[drawn].astype(np.float64)
        mean, turned_mean = (weights @ rows[drawn] / n for rows in (centred, turned))  # (D,) each
        scaled = turned[drawn] * np.sqrt(weights)[:, None]
        product = (scaled.T @ scaled - n * np.outer(turned_mean, turned_mean)) / (n - 1)  # (D, D)
        trace_of_drawn = (times @ squares - n * mean @ mean) / (n - 1)
        distances.append(mean @ mean + trace_of_drawn + trace - 2.0 * trace_of_root(product))
    return float(np.std(distances, ddof=1))


def inception_score(logits: np.ndarray, split_size: int = 5000) -> tuple[float, float | None]:
    """ADM's Inception Score of logits (N, K): the mean over consecutive splits of exp(mean KL(p(y|x) ‖ p(y))).

    Also the standard deviation over splits, None of one split. Splits follow the order of the files, the last may be
    shorter: in files sorted by class a split holds few classes and the score collapses.
    """
    logits = torch.from_numpy(np.asarray(logits, np.float64))  # (N, K)
    scores = []
    for part in logits.log_softmax(dim=1).split(split_size):  # (n, K)
        marginal = part.logsumexp(dim=0) - np.log(len(part))  # (K,): a class that is never seen stays finite
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None


def kid(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float | None]:
    """Kernel Inception Distance of x (N, D) and the reference y (M, D) (Bińkowski et al. 2018), as torch-fidelity has it.

    The mean over random subsets of the unbiased MMD² with the kernel (x·y / D + 1)³, and its standard deviation over them. Sets
    of fewer than `subset_size` are taken whole; where that leaves nothing to chance the deviation is None. A value a
    little below 0 is right for equal distributions. Arithmetic in the features' own precision, like torch-fidelity's.
    """
    size = min(subset_size, len(x), len(y))
    rng = np.random.RandomState(seed)  # legacy, since torch-fidelity's subsets come from it
    values = []
    for _ in range(subsets):
        a = x[rng.choice(len(x), size, replace=False)]
        b = y[rng.choice(len(y), size, replace=False)]
        within = _sum_of_pairs(_cubic(a, a)) + _sum_of_pairs(_cubic(b, b))
        across = _cubic(a, b).sum(axis=0).sum()
        values.append(float(within / (size * (size - 1)) - 2 * across / size**2))
    chance = size < max(len(x), len(y))
    return float(np.mean(values)), float(np.std(values)) if chance else None


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T * (1.0 / a.shape[1]) + 1.0) ** 3  # (n, m)


def _sum_of_pairs(kernel: np.ndarray) -> np.floating:
    return (kernel.sum(axis=1) - np.diagonal(kernel)).sum()  # without pairs of an image with itself


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, k: int = 3, *, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of samples (N, D) against real images (M, D), as ADM has them.

    Each vector has a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of samples inside a
    real image's ball, recall the share of real images inside a sample's. Squared distances in fp32 (ADM's are fp16 where
    they fit: 1e-3 off). Both depend on N and M.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"{k} neighbours need more images than {len(samples)} and {len(reference)}")
    device = torch.device(device)
    centre = reference.mean(axis=0)  # distances do not change, but round less near the origin
    x, y = (torch.tensor(side - centre, dtype=torch.float32, device=device) for side in (samples, reference))
    with full_precision(device):
        x_radii, y_radii = _radii(x, k), _radii(y, k)  # (N,), (M,)
        precise = [(block <= y_radii).any(dim=1) for block in _squared_distances(x, y)]
        recalled = [(block <= x_radii).any(dim=1) for block in _squared_distances(y, x)]
    return tuple(float(torch.cat(hits).double().mean()) for hits in (precise, recalled))


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """(N,) squared distance to the k-th neighbour; the nearest of all is the vector itself."""
    blocks = _squared_distances(x, x)
    return torch.cat([block.topk(k + 1, dim=1, largest=False).values[:, k] for block in blocks])


def _squared_distances(a: torch.Tensor, b: torch.Tensor):
    """(N, M) in blocks of rows."""
    lengths = (b**2).sum(dim=1)  # (M,)
    for rows in a.split(ROWS):
        yield ((rows**2).sum(dim=1, keepdim=True) + lengths - 2 * rows @ b.T).clamp(min=0)


def named_classes(prompts: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """The class (N,) whose name stands in each prompt, as whole words; None where a prompt names none or several."""
    patterns = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE) for name in names]
    found = {
        prompt: [k for k, one in enumerate(patterns) if one.search(prompt)]
        for prompt in dict.fromkeys(prompts)
    }
    if any(len(classes) != 1 for classes in found.values()):
        return None
    return np.array([found[prompt][0] for prompt in prompts])


def class_accuracy(predicted: np.ndarray, intended: np.ndarray) -> float:
    """Share, in [0, 1], of images whose predicted class is the intended one; both labels are (N,)."""
    if predicted.shape != intended.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise ValueError(f"labels must be two equal (N,), got {predicted.shape} and {intended.shape}")
    return float((predicted == intended).mean())
