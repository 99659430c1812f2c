"""Means and covariances of features, and the Fréchet distance between two of them. All in float64."""

from functools import cached_property

import numpy as np


class Moments:
    """Mean and covariance of feature vectors that arrive in batches.

    Batches are merged by Chan et al. (1979), which stays exact where the features' mean is large beside their spread; a plain
    sum of squares would not.
    """

    def __init__(self):
        self.count: int | None = 0  # None where a source does not say it (ADM's reference files)
        self.mean: np.ndarray | None = None  # (D,), of one vector or more
        self._scatter: np.ndarray | None = None  # (D, D), sum of outer products about the mean
        self._cov: np.ndarray | None = None  # (D, D), where it was given

    @classmethod
    def of(cls, mean: np.ndarray, cov: np.ndarray, count: int | None) -> "Moments":
        """Moments that were computed before: mean (D,), covariance (D, D). They can be compared, not continued."""
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("moments are not finite")
        moments = cls()
        moments.count, moments.mean, moments._cov = count, mean, cov
        return moments

    @property
    def dim(self) -> int | None:
        """D; None before the first vector."""
        return None if self.mean is None else len(self.mean)

    def update(self, features: np.ndarray) -> "Moments":
        """Add a batch (N, D), N >= 1, of finite values; returns itself."""
        batch = np.asarray(features, dtype=np.float64)  # (N, D)
        if batch.ndim != 2 or len(batch) == 0 or self.dim not in (None, batch.shape[1]):
            raise ValueError(f"features must be (N, {self.dim or 'D'}) with N >= 1, got {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError("features are not finite")
        mean = batch.mean(axis=0)  # (D,)
        centred = batch - mean  # (N, D)
        return self._join(len(batch), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Add what another process saw: the result is that of one process over both. Returns itself."""
        return self if other.count == 0 else self._join(other.count, other.mean, other._scatter)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray | None) -> "Moments":
        if self._cov is not None or scatter is None:
            raise ValueError("given moments cannot be continued")
        if self.dim not in (None, len(mean)):
            raise ValueError(f"moments of different features: {self.dim} and {len(mean)} dimensions")
        vars(self).pop("root", None)
        if self.count == 0:
            self.count, self.mean, self._scatter = count, mean.copy(), scatter.copy()
            return self
        total = self.count + count
        shift = mean - self.mean  # (D,)
        self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
        return self

    @property
    def cov(self) -> np.ndarray:
        """(D, D) covariance over N - 1, as `np.cov` and ADM's evaluator have it; needs two vectors."""
        if self._cov is not None:
            return self._cov
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 vectors, there are {self.count}")
        return self._scatter / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """(D, D) with root @ root.T == cov, computed once: what every distance to these moments shares.

        Any such factor serves a Fréchet distance. Cholesky's is found six times faster than the symmetric one, but a singular
        covariance (fewer vectors than dimensions) has none; there it comes from the eigenvectors.
        """
        try:
            return np.linalg.cholesky(self.cov)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(self.cov)  # (D,), (D, D)
            return vectors * np.sqrt(values.clip(min=0.0))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) (Heusel et al. 2017, eq. 6).

    With R Rᵀ = S_b, S_a S_b has the eigenvalues of Rᵀ S_a R, which is symmetric; tr (S_a S_b)^½ is the sum of their square
    roots. `eigvalsh` is several times faster than `sqrtm` or `eigvals` of the product and holds for singular covariances (fewer
    images than dimensions). Put the reference second: its root R is kept. In float32 the distance would shift by 0.01. Biased
    upwards by about 1/N: compare only numbers taken with equal N.
    """
    cov = a.cov
    offset = ((a.mean - b.mean) ** 2).sum()
    distance = offset + np.trace(cov) + np.trace(b.cov) - 2.0 * trace_of_root(b.root.T @ cov @ b.root)
    return max(float(distance), 0.0)


def trace_of_root(product: np.ndarray) -> float:
    """The trace of the square root of a symmetric, positive semi-definite (D, D) matrix."""
    return float(np.sqrt(np.linalg.eigvalsh(product).clip(min=0.0)).sum())
