"""The Fréchet distance of 2048-dimensional features: ours against those of torch-fidelity and clean-fid.

    OMP_NUM_THREADS=2 python benchmarks/frechet.py

float64 throughout, covariances of full rank whose spectrum falls as that of Inception's features does. Each arm is
timed `--repeats` times and the fastest counts: other work on the machine only ever adds time. "again" is ours against a
reference whose root is known, as for every further checkpoint, and a resample of the bootstrap.
"""

import sys
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import numpy as np
import scipy.linalg

from benchmarks.report import benchmark_parser, publish, target
from metrics.moments import Moments, frechet_distance
from metrics.quality import bootstrap_fd

DIM, IMAGES = 2048, 10_000


def main() -> None:
    args = benchmark_parser(__doc__, dim=(DIM, "dimensions"), repeats=(3, "timings of each arm")).parse_args()
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(args.dim, args.dim)) * (np.arange(1, args.dim + 1) ** -0.5)  # (D, D)
    a, b = (Moments().update(draw(rng, mix, 3 * args.dim, offset)) for offset in (0.0, 0.02))
    resampled = draw(rng, mix, IMAGES, 0.0).astype(np.float32)

    arms = {
        "ours": lambda: frechet_distance(a, Moments.of(b.mean, b.cov, b.count)),
        "ours, again": lambda: frechet_distance(a, b),
        "torch-fidelity: numpy.linalg.eigvals": lambda: by_eigvals(a, b),
        "clean-fid, pytorch-fid: scipy.linalg.sqrtm": lambda: by_sqrtm(a, b),
    }
    frechet_distance(a, b)  # finds the root of b
    results = {name: timed(arm, args.repeats) for name, arm in arms.items()}
    two, twelve = (timed(lambda n=n: bootstrap_fd(resampled, b, n), 1)[1] for n in (2, 12))
    value, ours = results["ours"]
    rows = []
    for name, (found, seconds) in results.items():
        row = {"Fréchet distance": name, "seconds": seconds, "this / ours": seconds / ours}
        rows.append(row | {"value": f"{found:.6f}", "relative difference": abs(found / value - 1)})
    name = f"ours, one resample of {IMAGES:,} images"
    rows.append({"Fréchet distance": name, "seconds": (twelve - two) / 10})
    targets = [target("ours, seconds", ours, at_most=12)]
    for row in rows[2:4]:
        name = row["Fréchet distance"]
        targets.append(target(f"{name}: relative difference", row["relative difference"], at_most=1e-6))
        targets.append(target(f"{name} / ours", row["this / ours"], at_least=2))
    publish(args, rows, targets)


def draw(rng: np.random.Generator, mix: np.ndarray, n: int, offset: float) -> np.ndarray:
    """(n, D) features: half of each is cut off at 0, as after a ReLU, so that they are no Gaussians."""
    return np.maximum(rng.normal(size=(n, len(mix))) @ mix.T / 10, -0.2) + offset


def timed(run: Callable[[], float], repeats: int) -> tuple[float, float]:
    """What it returns, and the fastest of its seconds."""
    found = []
    seconds = min(timeit.repeat(lambda: found.append(run()), number=1, repeat=repeats))
    return found[-1], seconds


def by_eigvals(a: Moments, b: Moments) -> float:
    return distance(a, b, np.sqrt(np.linalg.eigvals(a.cov @ b.cov).astype(complex)).real.sum())


def by_sqrtm(a: Moments, b: Moments) -> float:
    return distance(a, b, np.trace(scipy.linalg.sqrtm(a.cov @ b.cov).real))


def distance(a: Moments, b: Moments, root: float) -> float:
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * root)


if __name__ == "__main__":
    main()
