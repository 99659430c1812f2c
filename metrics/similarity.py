"""Similarity of a network's features to the teacher's tokens: held-out CCA, CKNNA, unbiased CKA, paired cosine.

Such numbers mislead easily. CCA is 1.0 on independent data once there are as many dimensions as data points, and the tokens of
one image are not independent data points; biased CKA is 0.8 there. So everything that is fitted here is fitted on one half of
the *images* and reported on the other. The layout that all images share is removed where it would raise the value, and a null
is given, in which images are paired at random.
"""

import numpy as np
from numpy import ndarray

from metrics.token_sums import flat, mapped, parts, product_sum, token_pair

NULLS = 5  # random pairings of images that a null is the mean of


class RankError(ValueError):
    """The tokens have fewer directions than are wanted: constant or collapsed features, or too few images."""


def split_by_image(n: int, seed: int) -> tuple[ndarray, ndarray]:
    """Split n images at random into two halves; returns their sorted, disjoint indices (fit, test)."""
    if n < 4:
        raise ValueError(f"a split by image needs at least 4 images, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def mispair(index: ndarray, rng: np.random.Generator) -> ndarray:
    """A random order of `index` that leaves nothing in its place: one random cycle through all of it."""
    order = rng.permutation(len(index))
    moved = np.empty_like(index)
    moved[order] = index[np.roll(order, 1)]
    return moved


def heldout_cca(x: ndarray, y: ndarray, *, k: int, seed: int) -> dict[str, float | int]:
    """Canonical correlations between tokens x (N, T, Dx) and y (N, T, Dy), reported on images not fitted on.

    Both lie on the same grid of T cells. Each side is reduced by `reduce_tokens` and whitened; the canonical directions are the
    singular vectors of the whitened cross-covariance. The correlations are Pearson's on the test images, in [-1, 1], in the
    order of the fit and with their sign. `null_mean_rho` is the mean over random pairings of images (never with themselves),
    fitted and reported alike. Returns mean_rho, top_rho, null_mean_rho, n_fit and n_test (images), k. Choose k well below the
    number of fit images. Raises `RankError` where a side has fewer than k directions.

    A side that was already reduced to the same k, with the same seed, gives the same result.
    """
    x, y = token_pair(x, y)
    fit, test = split_by_image(len(x), seed)
    xs, ys = (reduce_tokens(side, k=k, seed=seed) for side in (x, y))  # (N, T, k) each
    rho = _canonical_correlations(xs, ys, fit, fit, test, test)  # (k,)
    rng = np.random.default_rng([seed, 1])
    null = [
        _canonical_correlations(xs, ys, fit, mispair(fit, rng), test, mispair(test, rng)).mean()
        for _ in range(NULLS)
    ]
    numbers = {"mean_rho": float(rho.mean()), "top_rho": float(rho[0]), "null_mean_rho": float(np.mean(null))}
    return numbers | {"n_fit": len(fit), "n_test": len(test), "k": k}


def reduce_tokens(tokens: ndarray, *, k: int, seed: int) -> ndarray:
    """(N, T, D) -> (N, T, k) in float64: the first k principal components of the fit images.

    Each cell's mean over the fit images is subtracted, since a layout that all images share is no alignment.
    """
    fit, _ = split_by_image(len(tokens), seed)
    mean = tokens[fit].mean(axis=0, dtype=np.float64)  # (T, D)
    scatter = product_sum(tokens, tokens, fit, fit, mean, mean)  # (D, D)
    values, vectors = np.linalg.eigh(scatter)  # ascending (D,), (D, D)
    rank = int((values > values[-1] * 1e-10).sum())
    if not 1 <= k <= rank:
        raise RankError(f"k must be in [1, {rank}], the rank of the tokens {tokens.shape}; got {k}")
    return mapped(tokens, np.arange(len(tokens)), mean, vectors[:, ::-1][:, :k], np.float64)  # (N, T, k)


def cknna(x: ndarray, y: ndarray, *, k: int = 10, seed: int = 0) -> dict[str, float | int]:
    """Centred kernel nearest-neighbour alignment of x (N, Dx) and y (N, Dy), one vector per image.

    Huh et al. 2024, "The Platonic Representation Hypothesis": unbiased HSIC of the cosine kernels, restricted to pairs that are
    among each other's `k` nearest neighbours on both sides. Its value depends on N and k, so both are returned; `null_cknna`
    pairs the images at random.
    """
    x, y = _vector_pair(x, y)
    if not 1 <= k < len(x) - 3:
        raise ValueError(f"k must be in [1, N - 4] with N = {len(x)}, got {k}")
    kernel_x, kernel_y = (side @ side.T for side in (unit(x), unit(y)))  # (N, N) each
    value, null = _beside_null(lambda a, b: _kernel_alignment(a, b, k), kernel_x, kernel_y, [seed, 2])
    return {"cknna": value, "null_cknna": null, "n": len(x), "k": k}


def unbiased_cka(x: ndarray, y: ndarray, *, seed: int = 0) -> dict[str, float | int]:
    """Linear centred kernel alignment of x (N, Dx) and y (N, Dy), one vector per image.

    1 where they are equal up to a rotation and a scale, about 0 for independent data of any width. Kornblith et al. 2019 with
    the unbiased HSIC of Song et al. 2012 in place of the biased one, which reads 0.84 on 200 independent images of 1024
    dimensions. NaN where a side's own HSIC is not positive (constant features). `null_cka` pairs the images at random.
    """
    x, y = _vector_pair(x, y)
    # Unbiased HSIC ignores a common offset of the features; without it, it is not lost in rounding.
    kernel_x, kernel_y = (side @ side.T for side in (x - x.mean(axis=0), y - y.mean(axis=0)))  # (N, N) each
    value, null = _beside_null(_normalised_hsic, kernel_x, kernel_y, [seed, 3])
    return {"cka": float(value), "null_cka": null, "n": len(x)}


def paired_cosine(x: ndarray, y: ndarray) -> float:
    """Mean cosine, in [-1, 1], between tokens at the same place; x and y are (..., D) of one shape.

    This is what the token loss trains, so on the head's output it mainly shows that the loss was minimised.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.ndim < 2 or x.size == 0:
        raise ValueError(f"x and y must share one shape (..., D), got {x.shape} and {y.shape}")
    total = 0.0
    for part in parts(len(x)):
        total += (unit(x[part].astype(np.float64)) * unit(y[part].astype(np.float64))).sum()
    return float(total / (x.size / x.shape[-1]))


def pool_tokens(tokens: ndarray, grid_from: tuple[int, ...], grid_to: tuple[int, ...]) -> ndarray:
    """Average tokens (N, h*w, D) over the cells of a coarser grid: (N, h'*w', D).

    Of clips, (N, f*h*w, D) and grids (f, h, w), each frame is averaged like an image; both grids have the same frames.

    Exact by area, also where the grids do not divide (14 -> 8: a coarse cell weights each fine cell by their overlap). A finer
    grid is refused: up-sampled tokens add no samples.
    """
    if len(grid_from) == 3:
        if grid_from[0] != grid_to[0]:
            raise ValueError(
                f"grids {grid_from} and {grid_to} differ in their frames, which are never pooled"
            )
        images = tokens.reshape(len(tokens) * grid_from[0], -1, tokens.shape[-1])  # (N·f, h*w, D)
        pooled = pool_tokens(images, grid_from[1:], grid_to[1:])
        return pooled.reshape(len(tokens), -1, tokens.shape[-1])
    (h, w), (h_to, w_to) = grid_from, grid_to
    if tokens.ndim != 3 or tokens.shape[1] != h * w:
        raise ValueError(f"tokens must be (N, {h}*{w}, D), got {tokens.shape}")
    if not (1 <= h_to <= h and 1 <= w_to <= w):
        raise ValueError(f"cannot pool grid {grid_from} to the finer grid {grid_to}; pool the other side")
    rows, columns = _overlaps(h, h_to), _overlaps(w, w_to)  # (h', h), (w', w)
    pooled = np.empty((len(tokens), h_to * w_to, tokens.shape[-1]), tokens.dtype)
    for part in parts(len(tokens)):
        grid = tokens[part].reshape(-1, h, w, tokens.shape[-1])  # (n, h, w, D)
        mean = np.einsum("ah,bw,nhwd->nabd", rows, columns, grid, optimize=True)  # (n, h', w', D)
        pooled[part] = mean.reshape(len(grid), h_to * w_to, -1)
    return pooled  # (N, h'*w', D)


def _vector_pair(x: ndarray, y: ndarray) -> tuple[ndarray, ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be (N, Dx) and (N, Dy), got {x.shape} and {y.shape}")
    return x, y


def _canonical_correlations(xs, ys, fit_x, fit_y, test_x, test_y) -> ndarray:
    """Fit directions on the image pairs (fit_x, fit_y), return (k,) correlations on (test_x, test_y)."""
    a, b = flat(xs[fit_x]), flat(ys[fit_y])  # (M, k) each, mean 0; PCA has made their columns uncorrelated
    scale_a, scale_b = np.sqrt((a**2).mean(axis=0)), np.sqrt((b**2).mean(axis=0))  # (k,) each
    u, _, vt = np.linalg.svd((a / scale_a).T @ (b / scale_b))  # (k, k), (k,), (k, k)
    p, q = flat(xs[test_x]) / scale_a @ u, flat(ys[test_y]) / scale_b @ vt.T  # (M', k) each
    p, q = p - p.mean(axis=0), q - q.mean(axis=0)
    return (p * q).sum(axis=0) / np.sqrt((p**2).sum(axis=0) * (q**2).sum(axis=0))  # (k,)


def _beside_null(measure, kernel_x: ndarray, kernel_y: ndarray, seed: list[int]) -> tuple[float, float]:
    """A measure of two kernels (N, N), and its mean over random pairings of their images."""
    rng, images = np.random.default_rng(seed), np.arange(len(kernel_x))
    shuffled = [mispair(images, rng) for _ in range(NULLS)]  # (N,) each
    null = [measure(kernel_x, kernel_y[np.ix_(order, order)]) for order in shuffled]
    return measure(kernel_x, kernel_y), float(np.mean(null))


def _kernel_alignment(kernel_x: ndarray, kernel_y: ndarray, k: int) -> float:
    near_x, near_y = _nearest(kernel_x, k), _nearest(kernel_y, k)  # (N, N) in {0, 1}
    both = near_x * near_y  # (N, N)
    shared = _hsic_unbiased(both * kernel_x, both * kernel_y)
    self_x, self_y = (_hsic_unbiased(m, m) for m in (near_x * kernel_x, near_y * kernel_y))
    return float(shared / np.sqrt(self_x * self_y))


def _nearest(kernel: ndarray, k: int) -> ndarray:
    """(N, N) mask: 1 where the column is among the row's k nearest neighbours, itself excluded."""
    others = kernel - np.diag(np.full(len(kernel), np.inf))  # (N, N)
    nearest = np.argpartition(-others, k, axis=1)[:, :k]  # (N, k)
    mask = np.zeros_like(kernel)
    np.put_along_axis(mask, nearest, 1.0, axis=1)
    return mask


def _normalised_hsic(kernel_x: ndarray, kernel_y: ndarray) -> float:
    own = _hsic_unbiased(kernel_x, kernel_x), _hsic_unbiased(kernel_y, kernel_y)
    return _hsic_unbiased(kernel_x, kernel_y) / np.sqrt(own[0] * own[1]) if min(own) > 0 else float("nan")


def _hsic_unbiased(a: ndarray, b: ndarray) -> float:
    """Unbiased HSIC of two (N, N) kernels (Song et al. 2012, eq. 5), N >= 4; their diagonals do not count."""
    n = len(a)
    a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
    trace = (a * b.T).sum()
    product = a.sum(axis=0) @ b.sum(axis=1)  # the sum of all entries of a @ b
    return float((trace + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3)))


def _overlaps(n_from: int, n_to: int) -> ndarray:
    """(n_to, n_from) share of each coarse interval that each fine interval covers; rows sum to 1."""
    edges_from, edges_to = np.arange(n_from + 1) / n_from, np.arange(n_to + 1) / n_to
    low = np.maximum(edges_to[:-1, None], edges_from[None, :-1])  # (n_to, n_from)
    high = np.minimum(edges_to[1:, None], edges_from[None, 1:])  # (n_to, n_from)
    return (high - low).clip(min=0.0) * n_to


def unit(x: ndarray) -> ndarray:
    """Vectors (..., D) divided by their length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)
