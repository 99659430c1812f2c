"""Spatial structure of the tokens of one image: iREPA's LDS, CDS and RMSC on any grid (arXiv 2512.10794).

They need one side only, so compare them with those of the teacher's tokens *on the same grid*: a step on a coarse grid crosses
more of the image. iREPA's fourth, SRSS, compares tokens inside and outside a foreground mask; a cache of latents and
tokens holds no masks, so it is left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from metrics.similarity import unit

SIDE, FAR, REACH = 16, 6, 8  # iREPA's grid, its far distance, its longest distance of the slope
CHUNK = 32  # images at a time

Metrics = dict[str, dict[str, float | None]]  # {metric: {value, null, …}}


@dataclass(frozen=True)
class Distances:
    """Manhattan distances, in cells; None where a grid is too small for the quantity."""

    far: int | None  # pairs at this distance or more are distant
    reach: int | None  # the slope is fitted over the distances from 1 to this


def distances_on(grid: tuple[int, int]) -> Distances:
    """iREPA's distances, which it gives for 16 × 16, scaled by the shorter side: 3 and 4 on 8 × 8, 5 and 7 on 14 × 14.

    round(6 · side / 16) and round(8 · side / 16), halves upwards. Distant must be farther than a neighbour and a slope needs
    two points, so each must be 2 or more, or it is None: LDS begins at a side of 4, CDS at 3. (On 2 × 2 the only pairs that
    are no neighbours are the two diagonals; they are half an image apart, not distant.)
    """
    far, reach = ((2 * distance * min(grid) + SIDE) // (2 * SIDE) for distance in (FAR, REACH))
    return Distances(far if far >= 2 else None, reach if reach >= 2 else None)


def spatial_metrics(tokens: ndarray, grid: tuple[int, int], *, seed: int) -> Metrics:
    """LDS, CDS and RMSC of tokens (N, h·w, D), row by row on `grid` (h, w): {name: {value, null}}, means over images.

    With cosines of tokens, and d their Manhattan distance on the grid:
    - lds: mean cosine of neighbours (d = 1) minus that of distant pairs (d ≥ far), in [-2, 2].
    - cds: minus the slope of the mean cosine against d = 1 … reach, per cell.
    - rmsc: root mean square distance of an image's L2-normalised tokens from their mean, in [0, 1].

    The null shuffles the positions within each image. RMSC does not depend on positions, so it has no null.
    """
    h, w = grid
    if tokens.ndim != 3 or tokens.shape[1] != h * w or h * w < 2:
        raise ValueError(f"tokens must be (N, {h}*{w}, D) with two cells or more, got {tokens.shape}")
    rng = np.random.default_rng([seed, 5])
    rows, columns = np.divmod(np.arange(h * w), w)
    manhattan = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns)  # (T, T)
    at = np.arange(1, h + w - 1)[:, None] == manhattan.ravel()  # (h+w-2, T·T): at distance 1, 2, …
    pairs = at.sum(axis=1)  # (h+w-2,) ordered pairs at each distance
    mean_at = at / pairs[:, None]  # (h+w-2, T·T) weights that average over these pairs
    sums = {"value": np.zeros(len(at)), "null": np.zeros(len(at))}  # of the mean cosine at each distance
    contrast = 0.0
    for start in range(0, len(tokens), CHUNK):
        x = unit(tokens[start : start + CHUNK].astype(np.float64))  # (n, T, D)
        order = rng.permuted(np.tile(np.arange(h * w), (len(x), 1)), axis=1)  # (n, T)
        for which, places in (("value", x), ("null", np.take_along_axis(x, order[..., None], axis=1))):
            cosines = places @ places.transpose(0, 2, 1)  # (n, T, T)
            sums[which] += mean_at @ cosines.sum(axis=0).ravel()
        contrast += np.sqrt(((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=-1).mean(axis=1)).sum()
    found: Metrics = {name: {"value": None, "null": None} for name in ("lds", "cds", "rmsc")}
    found["rmsc"]["value"] = float(contrast / len(tokens))
    distances = distances_on(grid)
    for which, total in sums.items():
        mean = total / len(tokens)  # (h+w-2,) cosine at each distance
        if (far := distances.far) is not None:
            found["lds"][which] = float(mean[0] - np.average(mean[far - 1 :], weights=pairs[far - 1 :]))
        if (reach := distances.reach) is not None:
            found["cds"][which] = float(-np.polyfit(np.arange(1, reach + 1), mean[:reach], 1)[0])
    return found
