"""Metrics of clips: how they move, how they flicker, and how far their features lie from those of real clips.

A clip is uint8 RGB `(F, H, W, 3)`. No value of a generated clip means anything alone: a still picture flickers least of all. So
every measure is given beside that of real clips, and beside `motion`, which a still picture has none of.
"""

from collections.abc import Iterable, Mapping

import cv2
import numpy as np

from metrics.moments import Moments, frechet_distance
from metrics.quality import BOOTSTRAP, bootstrap_fd, metric_name

STATIC = 0.25  # pixels a frame, below which a pixel counts as standing still
# Farnebäck's flow: pyramids of halves, a window of 15 px. The pyramid has fewer levels where the picture is small.
FLOW = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 5,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
MEASURES = ("flicker", "warping_error", "motion", "difference")


def compare_clips(
    of_drawn: Mapping[str, np.ndarray],
    of_real: Mapping[str, np.ndarray],
    *,
    drawn_features: np.ndarray | None = None,
    real_features: np.ndarray | None = None,
    drawn_frames: np.ndarray | None = None,
    real_frames: np.ndarray | None = None,
    intended: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, dict]:
    """All measures of drawn clips beside those of real ones: {name: {value, error, error_kind, real, notes}}.

    `of_drawn` and `of_real` are what `measure_clips` gives. Features of whole clips `(n, D)` give a Fréchet distance, which has
    no value of real clips alone; a teacher's features of frames `(n, F, [N,] D)` give the temporal consistency; the classes
    that clips were to show and do show, `(n,)`, give an accuracy. Errors are
    standard errors over clips, or by bootstrap. Names end with the number of drawn clips.
    """
    of_drawn, of_real = dict(of_drawn), dict(of_real)
    if drawn_frames is not None and real_frames is not None:
        of_drawn["consistency"], of_real["consistency"] = map(
            temporal_consistency, (drawn_frames, real_frames)
        )
    n = len(of_drawn["motion"])
    results = {}
    for measure, values in of_drawn.items():
        results[metric_name("video", measure, n)] = _entry(values, of_real[measure])
    if intended is not None and predicted is not None:
        correct = _entry((intended == predicted).astype(float), np.empty(0))
        results[metric_name("video", "accuracy", n)] = correct
    if drawn_features is not None and real_features is not None:
        pool, reference = np.asarray(drawn_features, np.float64), Moments().update(real_features)
        few = f"{len(pool)} clips for {pool.shape[1]} dimensions: a covariance needs more clips than that"
        results[metric_name("video", "fd", n)] = {
            "value": frechet_distance(Moments().update(pool), reference),
            "error": bootstrap_fd(pool, reference, bootstrap, seed) if bootstrap else None,
            "error_kind": "bootstrap" if bootstrap else None,
            "real": None,
            "notes": [few] if len(pool) <= pool.shape[1] else [],
        }
    return results


def measure_clips(clips: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The measures of `measure_motion` of every clip, `(n,)` each; one clip is in memory at a time."""
    rows = [measure_motion(clip) for clip in clips]
    if not rows:
        raise ValueError("there are no clips to measure")
    return {name: np.array([row[name] for row in rows]) for name in MEASURES}


def measure_motion(clip: np.ndarray) -> dict[str, float]:
    """Four means over all pairs of neighbouring frames of a clip `(F, H, W, 3)`, F >= 2.

    flicker: absolute difference, in grey levels of 255, of pixels that stand still by the optical flow; NaN where none does.
    warping_error: squared difference, of values in [0, 1], of a frame and the next one warped back along the flow, over pixels
    that are not occluded (Lai et al. 2018, arXiv 1808.00449); NaN where all are.
    motion: the length of the flow, in pixels a frame. difference: the absolute difference of all pixels, in grey levels.
    """
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or len(clip) < 2:
        raise ValueError(f"a clip is uint8 (F, H, W, 3) with F >= 2, got {clip.dtype} {clip.shape}")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    sums, counts = dict.fromkeys(MEASURES, 0.0), dict.fromkeys(MEASURES, 0)

    def add(name: str, values: np.ndarray) -> None:
        sums[name] += float(values.sum(dtype=np.float64))
        counts[name] += values.size

    for now in range(len(clip) - 1):
        a, b = clip[now].astype(np.float32), clip[now + 1].astype(np.float32)  # (H, W, 3)
        forward, backward = optical_flow(grey[now], grey[now + 1]), optical_flow(grey[now + 1], grey[now])
        length = np.linalg.norm(forward, axis=-1)  # (H, W)
        add("motion", length)
        add("difference", np.abs(a - b))
        add("flicker", np.abs(a - b)[length < STATIC])
        seen = ~occluded(forward, backward)
        add("warping_error", np.square((warp(b, forward) - a)[seen] / 255))
    return {name: sums[name] / counts[name] if counts[name] else float("nan") for name in MEASURES}


def temporal_consistency(features: np.ndarray) -> np.ndarray:
    """The mean cosine `(n,)` of a teacher's features of neighbouring frames, `(n, F, D)`, or of every cell, `(n, F, N, D)`."""
    features = np.asarray(features, np.float64)
    if features.ndim not in (3, 4) or features.shape[1] < 2:
        raise ValueError(f"features must be (n, F, D) or (n, F, N, D) with F >= 2, got {features.shape}")
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    unit = features / np.maximum(lengths, 1e-12)
    cosines = (unit[:, :-1] * unit[:, 1:]).sum(axis=-1)  # (n, F - 1[, N])
    return cosines.reshape(len(cosines), -1).mean(axis=1)


def optical_flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Farnebäck's flow `(H, W, 2)`, x and y in pixels, from grey pictures `a` to `b` `(H, W)`: b at x + flow is a at x."""
    if np.array_equal(a, b):  # where Farnebäck's gives a few thousandths of a pixel
        return np.zeros((*a.shape, 2), np.float32)
    return cv2.calcOpticalFlowFarneback(a, b, None, **FLOW)


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The float32 picture `(H, W[, C])` read at x + flow, bilinearly."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(
        picture, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def occluded(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Whether a pixel has no counterpart in the next frame, bool `(H, W)`: it leaves the picture, or does not come back.

    The flow there and back must cancel, up to 0.01 of both squared lengths and half a squared pixel (Ruder et al. 2016,
    arXiv 1604.08610).
    """
    height, width = forward.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + forward[..., 0], y + forward[..., 1]
    outside = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
    back = warp(backward, forward)
    apart = np.square(forward + back).sum(axis=-1)
    both = np.square(forward).sum(axis=-1) + np.square(back).sum(axis=-1)
    return outside | (apart >= 0.01 * both + 0.5)


def _entry(values: np.ndarray, real: np.ndarray) -> dict:
    """Mean and standard error of a measure over the clips that have it, beside the mean of the real ones."""
    found, of_real = values[np.isfinite(values)], real[np.isfinite(real)]
    lacking = len(values) - len(found)
    return {
        "value": float(found.mean()) if len(found) else None,
        "error": float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None,
        "error_kind": "clips" if len(found) > 1 else None,
        "real": float(of_real.mean()) if len(of_real) else None,
        "notes": [f"{lacking} of {len(values)} clips have no pixel to measure"] if lacking else [],
    }
