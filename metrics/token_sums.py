"""Sums over the tokens of many images in float64, a few images at a time, so that no float64 copy of all tokens is made."""

from collections.abc import Iterator

import numpy as np
from numpy import ndarray

CHUNK = 32  # images turned to float64 at a time: 21 MB of SD-1.5's mid-block features at 512 px


def parts(n: int) -> Iterator[slice]:
    """Slices that cover n images, a few images each."""
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def product_sum(
    x: ndarray, y: ndarray, images_x: ndarray, images_y: ndarray, mean_x: ndarray, mean_y: ndarray
) -> ndarray:
    """(Dx, Dy) sum of the outer products of tokens x (N, T, Dx) and y (N, T, Dy) of images paired as given.

    The means, (D,) or (T, D) each, are subtracted from the tokens first.
    """
    total = np.zeros((x.shape[-1], y.shape[-1]))
    for part in parts(len(images_x)):
        a = flat(x[images_x[part]] - mean_x)  # (M, Dx)
        b = a if x is y and images_x is images_y else flat(y[images_y[part]] - mean_y)  # (M, Dy)
        total += a.T @ b
    return total


def mapped(
    x: ndarray, images: ndarray, mean: ndarray, weights: ndarray, dtype: np.dtype, offset: ndarray | float = 0
) -> ndarray:
    """(x - mean) @ weights + offset of these images' tokens: (n, T, D')."""
    out = np.empty((len(images), x.shape[1], weights.shape[1]), dtype)
    for part in parts(len(images)):
        out[part] = (x[images[part]] - mean) @ weights + offset
    return out


def token_pair(x: ndarray, y: ndarray) -> tuple[ndarray, ndarray]:
    """x and y, after checking that they are finite tokens of the same cells of the same images."""
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(f"x and y must be (N, T, …) on one grid, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("tokens are not finite")
    return x, y


def flat(tokens: ndarray) -> ndarray:
    return tokens.reshape(-1, tokens.shape[-1])  # (N*T, D)
