"""Numbers about sets of images, from their features: Fréchet distance and class accuracy. All in float64."""

import numpy as np


class Moments:
    """Mean and covariance of feature vectors that arrive in batches, in float64.

    Holds D + D² numbers whatever the count. Batches are merged by Chan et al. (1979), which stays exact
    where the features' mean is large beside their spread; a plain sum of squares would not.
    """

    def __init__(self, dim: int | None = None):
        """`dim` is checked on every batch; None lets the first batch set it."""
        self.dim = dim
        self.count = 0
        self._mean: np.ndarray | None = None  # (D,)
        self._scatter: np.ndarray | None = None  # (D, D), sum of outer products about the mean

    def update(self, features: np.ndarray) -> "Moments":
        """Add a batch (N, D), N >= 1, of finite values; returns itself."""
        batch = np.asarray(features, dtype=np.float64)  # (N, D)
        if batch.ndim != 2 or len(batch) == 0 or self.dim not in (None, batch.shape[1]):
            raise ValueError(f"features must be (N, {self.dim or 'D'}) with N >= 1, got {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError("features are not finite")
        mean = batch.mean(axis=0)  # (D,)
        centred = batch - mean  # (N, D)
        scatter = centred.T @ centred  # (D, D)
        if self.count == 0:
            self.dim, self.count, self._mean, self._scatter = batch.shape[1], len(batch), mean, scatter
            return self
        total = self.count + len(batch)
        shift = mean - self._mean  # (D,)
        self._scatter += scatter + np.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total
        return self

    @property
    def mean(self) -> np.ndarray:
        """(D,) mean; at least one vector must have been seen."""
        if self.count < 1:
            raise ValueError("no features yet")
        return self._mean

    @property
    def cov(self) -> np.ndarray:
        """(D, D) covariance over N - 1, as `np.cov` and ADM's evaluator have it; needs two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 vectors, there are {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) (Heusel et al. 2017,
    eq. 6).

    tr (S_a S_b)^½ is the sum of the square roots of the eigenvalues of S_a^½ S_b S_a^½, which is symmetric:
    `eigh` is some ten times faster than `sqrtm` and holds for singular covariances (fewer images than
    dimensions). float64 throughout, since float32 eigensolvers shift the distance by 0.01. Biased upwards
    by about 1/N: compare only numbers taken with equal N.
    """
    if a.dim != b.dim:
        raise ValueError(f"moments of different features: {a.dim} and {b.dim} dimensions")
    values, vectors = np.linalg.eigh(a.cov)  # (D,), (D, D)
    root = vectors * np.sqrt(values.clip(min=0.0))  # (D, D), root @ root.T == a.cov
    product = np.linalg.eigvalsh(root.T @ b.cov @ root)  # (D,)
    trace_root = np.sqrt(product.clip(min=0.0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2.0 * trace_root
    return max(float(distance), 0.0)


def class_accuracy(predicted: np.ndarray, intended: np.ndarray) -> float:
    """Share, in [0, 1], of images taken for the class they were asked to show; both labels are (N,)."""
    predicted, intended = np.asarray(predicted), np.asarray(intended)
    if predicted.shape != intended.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise ValueError(
            f"labels must be two equal (N,) with N >= 1, got {predicted.shape} and {intended.shape}"
        )
    return float((predicted == intended).mean())
