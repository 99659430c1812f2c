"""How much of the teacher the U-Net holds: held-out CCA, CKNNA, paired cosine, ridge maps, and a joint t-SNE.

Alignment numbers lie easily. CCA reads 1.0 on independent data once there are as many dimensions as
samples, and the tokens of one image are not independent samples. So everything fitted here is fitted on one
half of the *images* and reported on the other, with the layout all images share removed, beside a null in
which images are paired at random.
"""

import numpy as np


def split_by_image(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split n images at random into two halves; returns their sorted, disjoint indices (fit, test)."""
    if n < 4:
        raise ValueError(f"a split by image needs at least 4 images, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def heldout_cca(x: np.ndarray, y: np.ndarray, *, k: int, seed: int, nulls: int = 5) -> dict[str, float | int]:
    """Canonical correlations between tokens x (N, T, Dx) and y (N, T, Dy), reported on images not fitted on.

    Both lie on the same grid of T cells. Per side: subtract each cell's mean over the fit images (a layout
    that all images share is no alignment), reduce to `k` principal components, whiten; the canonical
    directions are the singular vectors of the whitened cross-covariance. The correlations are Pearson's on
    the test images, in [-1, 1], in the order of the fit and with their sign. `null_mean_rho` is the mean
    over `nulls` random pairings of images (never with themselves), fitted and reported alike. Returns
    mean_rho, top_rho, null_mean_rho, n_fit and n_test (images), k. Choose k well below the number of fit
    images.
    """
    x, y = _token_pair(x, y)
    fit, test = split_by_image(len(x), seed)
    xs, ys = (_reduce(side, fit, k) for side in (x, y))  # (N, T, k) each
    rho = _canonical_correlations(xs, ys, fit, fit, test, test)  # (k,)
    rng = np.random.default_rng([seed, 1])
    null = [
        _canonical_correlations(xs, ys, fit, _mispair(fit, rng), test, _mispair(test, rng)).mean()
        for _ in range(nulls)
    ]
    return {
        "mean_rho": float(rho.mean()),
        "top_rho": float(rho[0]),
        "null_mean_rho": float(np.mean(null)),
        "n_fit": len(fit),
        "n_test": len(test),
        "k": k,
    }


def cknna(x: np.ndarray, y: np.ndarray, *, k: int = 10, seed: int = 0) -> dict[str, float | int]:
    """Centred kernel nearest-neighbour alignment of x (N, Dx) and y (N, Dy), one vector per image.

    Huh et al. 2024, "The Platonic Representation Hypothesis": unbiased HSIC of the cosine kernels,
    restricted to pairs that are among each other's `k` nearest neighbours on both sides. Its value depends
    on N and k, so both are returned; `null_cknna` pairs the images at random.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be (N, Dx) and (N, Dy), got {x.shape} and {y.shape}")
    if not 1 <= k < len(x) - 3:
        raise ValueError(f"k must be in [1, N - 4] with N = {len(x)}, got {k}")
    kernel_x, kernel_y = (side @ side.T for side in (_unit(x), _unit(y)))  # (N, N) each
    shuffled = _mispair(np.arange(len(x)), np.random.default_rng([seed, 2]))  # (N,)
    return {
        "cknna": _kernel_alignment(kernel_x, kernel_y, k),
        "null_cknna": _kernel_alignment(kernel_x, kernel_y[np.ix_(shuffled, shuffled)], k),
        "n": len(x),
        "k": k,
    }


def paired_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Mean cosine, in [-1, 1], between tokens at the same place; x and y are (..., D) of one shape.

    This is what the token loss trains, so on the head's output it mainly shows that the loss was minimised.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim < 2 or x.size == 0:
        raise ValueError(f"x and y must share one shape (..., D), got {x.shape} and {y.shape}")
    return float((_unit(x) * _unit(y)).sum(axis=-1).mean())


def pool_tokens(tokens: np.ndarray, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> np.ndarray:
    """Average tokens (N, h*w, D) over the cells of a coarser grid: (N, h'*w', D).

    Exact by area, also where the grids do not divide (14 -> 8: a coarse cell weights each fine cell by
    their overlap). A finer grid is refused: up-sampled tokens add no samples.
    """
    (h, w), (h_to, w_to) = grid_from, grid_to
    if tokens.ndim != 3 or tokens.shape[1] != h * w:
        raise ValueError(f"tokens must be (N, {h}*{w}, D), got {tokens.shape}")
    if not (1 <= h_to <= h and 1 <= w_to <= w):
        raise ValueError(f"cannot pool grid {grid_from} to the finer grid {grid_to}; pool the other side")
    grid = tokens.reshape(len(tokens), h, w, -1)  # (N, h, w, D)
    rows, columns = _overlaps(h, h_to), _overlaps(w, w_to)  # (h', h), (w', w)
    pooled = np.einsum("ah,bw,nhwd->nabd", rows, columns, grid, optimize=True)  # (N, h', w', D)
    return pooled.reshape(len(tokens), h_to * w_to, -1).astype(tokens.dtype, copy=False)  # (N, h'*w', D)


def ridge_project(
    x: np.ndarray, y: np.ndarray, *, seed: int, ridge: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
    """Map tokens x (N, T, Dx) to the space of y (N, T, Dy) by ridge regression, fitted on half of the images.

    Returns the projection of the other half (n_test, T, Dy) and its image indices (n_test,), the same split
    as `heldout_cca` makes for this seed. It gives a run without a head, or the base model, a view in the
    teacher's space. `ridge` is relative to the mean variance of x; 0 is plain least squares.
    """
    x, y = _token_pair(x, y)
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    fit, test = split_by_image(len(x), seed)
    x_mean, y_mean = x[fit].mean(axis=(0, 1)), y[fit].mean(axis=(0, 1))  # (Dx,), (Dy,)
    a, b = _flat(x[fit] - x_mean), _flat(y[fit] - y_mean)  # (M, Dx), (M, Dy)
    gram = a.T @ a  # (Dx, Dx)
    penalty = ridge * np.trace(gram) / len(gram)
    # lstsq, not solve: with ridge 0 the features may be rank-deficient.
    weights = np.linalg.lstsq(gram + penalty * np.eye(len(gram)), a.T @ b, rcond=None)[0]  # (Dx, Dy)
    return (x[test] - x_mean) @ weights + y_mean, test  # (n_test, T, Dy), (n_test,)


def joint_tsne(x: np.ndarray, y: np.ndarray, seed: int, *, centre: bool = False) -> np.ndarray:
    """Embed tokens x (M, D) and y (M, D) jointly in the plane; returns (2, M, 2): x's points, then y's.

    Both sides are L2-normalised (and centred each by itself with `centre`: an offset alone separates two
    clouds), then reduced to 50 principal components or fewer. The seed is fixed; distances between clusters
    mean nothing.
    """
    from sklearn.manifold import TSNE

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or x.shape != y.shape or len(x) < 4:
        raise ValueError(f"x and y must share one shape (M, D) with M >= 4, got {x.shape} and {y.shape}")
    sides = [_unit(x), _unit(y)]
    if centre:
        sides = [_unit(side - side.mean(axis=0)) for side in sides]
    points = np.concatenate(sides)  # (2M, D)
    points = points - points.mean(axis=0)
    _, _, directions = np.linalg.svd(points, full_matrices=False)
    points = points @ directions[:50].T  # (2M, min(50, D, 2M))
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)  # (2M, 2)
    return plane.reshape(2, len(x), 2)


def _token_pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"x and y must be (N, T, Dx) and (N, T, Dy) on one grid, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("tokens are not finite")
    return x, y


def _reduce(tokens: np.ndarray, fit: np.ndarray, k: int) -> np.ndarray:
    """(N, T, D) -> (N, T, k): cell means removed and principal components taken, both from the fit images."""
    centred = tokens - tokens[fit].mean(axis=0)  # (N, T, D)
    flat = _flat(centred[fit])  # (M, D)
    values, vectors = np.linalg.eigh(flat.T @ flat / len(flat))  # ascending (D,), (D, D)
    rank = int((values > values[-1] * 1e-10).sum())
    if not 1 <= k <= rank:
        raise ValueError(f"k must be in [1, {rank}], the rank of the tokens {tokens.shape}; got {k}")
    return centred @ vectors[:, ::-1][:, :k]  # (N, T, k)


def _canonical_correlations(xs, ys, fit_x, fit_y, test_x, test_y) -> np.ndarray:
    """Fit directions on the image pairs (fit_x, fit_y), return (k,) correlations on (test_x, test_y)."""
    a, b = _flat(xs[fit_x]), _flat(ys[fit_y])  # (M, k) each, mean 0; PCA has made their columns uncorrelated
    scale_a, scale_b = np.sqrt((a**2).mean(axis=0)), np.sqrt((b**2).mean(axis=0))  # (k,) each
    u, _, vt = np.linalg.svd((a / scale_a).T @ (b / scale_b))  # (k, k), (k,), (k, k)
    p, q = _flat(xs[test_x]) / scale_a @ u, _flat(ys[test_y]) / scale_b @ vt.T  # (M', k) each
    p, q = p - p.mean(axis=0), q - q.mean(axis=0)
    return (p * q).sum(axis=0) / np.sqrt((p**2).sum(axis=0) * (q**2).sum(axis=0))  # (k,)


def _mispair(index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of `index` that leaves nothing in its place: one random cycle through all of it."""
    order = rng.permutation(len(index))
    moved = np.empty_like(index)
    moved[order] = index[np.roll(order, 1)]
    return moved


def _kernel_alignment(kernel_x: np.ndarray, kernel_y: np.ndarray, k: int) -> float:
    near_x, near_y = _nearest(kernel_x, k), _nearest(kernel_y, k)  # (N, N) in {0, 1}
    both = near_x * near_y  # (N, N)
    shared = _hsic_unbiased(both * kernel_x, both * kernel_y)
    self_x, self_y = (_hsic_unbiased(m, m) for m in (near_x * kernel_x, near_y * kernel_y))
    return float(shared / np.sqrt(self_x * self_y))


def _nearest(kernel: np.ndarray, k: int) -> np.ndarray:
    """(N, N) mask: 1 where the column is among the row's k nearest neighbours, itself excluded."""
    others = kernel - np.diag(np.full(len(kernel), np.inf))  # (N, N)
    nearest = np.argpartition(-others, k, axis=1)[:, :k]  # (N, k)
    mask = np.zeros_like(kernel)
    np.put_along_axis(mask, nearest, 1.0, axis=1)
    return mask


def _hsic_unbiased(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased HSIC of two (N, N) kernels (Song et al. 2012, eq. 5), N >= 4; their diagonals do not count."""
    n = len(a)
    a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
    trace = (a * b.T).sum()
    # The sum of all entries of a @ b, without the matrix product.
    product = a.sum(axis=0) @ b.sum(axis=1)
    return float((trace + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3)))


def _overlaps(n_from: int, n_to: int) -> np.ndarray:
    """(n_to, n_from) share of each coarse interval that each fine interval covers; rows sum to 1."""
    edges_from, edges_to = np.arange(n_from + 1) / n_from, np.arange(n_to + 1) / n_to
    low = np.maximum(edges_to[:-1, None], edges_from[None, :-1])  # (n_to, n_from)
    high = np.minimum(edges_to[1:, None], edges_from[None, 1:])  # (n_to, n_from)
    return (high - low).clip(min=0.0) * n_to


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)


def _flat(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(-1, tokens.shape[-1])  # (N*T, D)
