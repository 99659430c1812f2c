"""Make and read the rows of `align.json`: all metrics of one model's features at one tap and timestep, each {value, null}.

A row has `model` (run or base), `tap`, `timestep`, `features` (tap: the network's own, before the head; head: the head's
tokens, after it) and `metrics`. Every metric compares with the teacher's tokens on the coarser of the tap's grid and the
teacher's, over whose cells the finer side is averaged, except `cosine`, which is the token loss's own, on the teacher's grid.
Of a clip the cells of all its latent frames are compared, and "an image" below is a clip, but for lds, cds and rmsc of a frame.

| metric | of | what it is | its null |
|---|---|---|---|
| cosine | head | mean cosine of the head's tokens with the teacher's | tokens of other images |
| ridge_cosine, ridge_r2 | tap | of a linear map to the teacher's tokens, on images not fitted on | fitted on mispaired images |
| cca | both | mean held-out canonical correlation | fitted on mispaired images |
| cknna, cka | both | shared neighbours, and unbiased linear CKA, of one mean vector an image | mispaired images |
| lds, cds, rmsc | both | spatial structure, of this side alone; `teacher` has its own on this grid | shuffled positions |
| probe | both | accuracy of a linear probe on one mean vector an image | shuffled labels |

A value is None where it is not defined: a grid too small for it, fewer directions than CCA is to use, too few images of a
class. Images without classes have no row `probe`. rmsc does not look at positions, so it has no null.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numpy import ndarray

from metrics.probes import probe_accuracy, ridge_alignment
from metrics.similarity import RankError, cknna, heldout_cca, pool_tokens, reduce_tokens, unbiased_cka
from metrics.spatial import Metrics, spatial_metrics

TIMESTEPS = (50, 250, 500, 750)
SHOWN_TIMESTEP = 250  # the nearest to it is in tables and figures of a single timestep
NUM_IMAGES = 1000  # unless another number is asked for; SD-1.5's three taps at 512 px then take about 4 GB
CKNNA_K = 10  # neighbours, as in REPA
CCA_K = 64  # principal components a side, at most

Grid = tuple[int, ...]  # (h, w) of an image, (f, h, w) of a clip


@dataclass(frozen=True)
class TeacherSide:
    """The teacher's side of a comparison on one grid."""

    tokens: ndarray  # (n, T, D)
    components: ndarray  # (n, T, k), their principal components for CCA
    classes: ndarray | None  # (n,), those of the images; None where they have none
    grid: Grid  # of the T tokens
    seed: int  # decides the split and all nulls

    @classmethod
    def on(
        cls,
        grid: Grid,
        teacher: ndarray,
        teacher_grid: Grid,
        classes: ndarray | None,
        *,
        k: int,
        seed: int,
    ) -> "TeacherSide":
        """Average the teacher's tokens (n, N, D) over the cells of `grid`."""
        tokens = pool_tokens(teacher, teacher_grid, grid)  # (n, T, D)
        return cls(tokens, reduce_tokens(tokens, k=k, seed=seed), classes, grid, seed)

    def metrics(self) -> Metrics:
        """The teacher's own values of the metrics that need one side only."""
        return _one_side(self.tokens, self)


def cca_components(n: int, cells: int, *widths: int) -> int:
    """How many principal components CCA keeps: well below the widths and the number of tokens it is fitted on."""
    return max(1, min(CCA_K, *(width // 2 for width in widths), n * cells // 8))


def tap_metrics(features: ndarray, teacher: TeacherSide) -> tuple[Metrics, ndarray]:
    """All metrics of a tap's features (n, T, C), and their ridge map to the teacher's space (n_test, T, D)."""
    ridge, projected = ridge_alignment(features, teacher.tokens, seed=teacher.seed)
    cosine = entry(ridge["cosine"], ridge["null_cosine"])
    r2 = entry(ridge["r2"], ridge["null_r2"], penalty=ridge["ridge"])
    return {"ridge_cosine": cosine, "ridge_r2": r2, **_both_sides(features, teacher)}, projected


def head_metrics(tokens: ndarray, cosine: float, null_cosine: float, teacher: TeacherSide) -> Metrics:
    """All metrics of a head's tokens (n, T, D) on the grid compared on, beside their cosine on the teacher's."""
    return {"cosine": entry(cosine, null_cosine), **_both_sides(tokens, teacher)}


def entry(value: float | None, null: float | None, **more) -> dict[str, float | None]:
    """{value, null, …} with None for what is not finite."""
    found = {"value": value, "null": null} | more
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def row_of(
    result: Mapping, *,
    model: str = "run", tap: str | None = None, timestep: int = SHOWN_TIMESTEP, features: str = "tap",
) -> Metrics | None:  # fmt: skip
    """The metrics of one row of `align.json`; None where it was not measured (no head at that tap, another timestep).

    `tap` None is the family's main tap.
    """
    tap = result["main_tap"] if tap is None else tap
    wanted = {"model": model, "tap": tap, "timestep": timestep, "features": features}
    found = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
    return found[0]["metrics"] if found else None


def value_of(result: Mapping, metric: str, which: str = "value", **row) -> float | None:
    """One number of `align.json`, `which` = value or null, of the row that `row_of` finds; None where there is none."""
    found = row_of(result, **row)
    return None if found is None or metric not in found else found[metric][which]


def nearest_timestep(timesteps: Sequence[int], wanted: int = SHOWN_TIMESTEP) -> int:
    """The one that figures and tables of a single timestep show."""
    return min(timesteps, key=lambda timestep: (abs(timestep - wanted), timestep))


def _both_sides(tokens: ndarray, teacher: TeacherSide) -> Metrics:
    x, y, seed = tokens.mean(axis=1), teacher.tokens.mean(axis=1), teacher.seed  # (n, D) each
    neighbours, kernels = cknna(x, y, k=CKNNA_K, seed=seed), unbiased_cka(x, y, seed=seed)
    try:
        found = heldout_cca(tokens, teacher.components, k=teacher.components.shape[-1], seed=seed)
        cca = entry(found["mean_rho"], found["null_mean_rho"], top=found["top_rho"])
    except RankError as error:  # features that collapsed
        cca = entry(None, None, reason=str(error))
    found = {"cknna": entry(neighbours["cknna"], neighbours["null_cknna"]), "cca": cca}
    return found | {"cka": entry(kernels["cka"], kernels["null_cka"])} | _one_side(tokens, teacher)


def _one_side(tokens: ndarray, teacher: TeacherSide) -> Metrics:
    h, w = teacher.grid[-2:]
    images = tokens.reshape(-1, h * w, tokens.shape[-1])  # of a clip each frame
    found = spatial_metrics(images, (h, w), seed=teacher.seed)
    metrics = {name: entry(**numbers) for name, numbers in found.items()}
    if teacher.classes is None:
        return metrics
    metrics["probe"] = entry(None, None)
    probe = probe_accuracy(tokens.mean(axis=1), teacher.classes, seed=teacher.seed)
    if probe is not None:
        more = {name: probe[name] for name in ("chance", "num_classes")}
        metrics["probe"] = entry(probe["accuracy"], probe["null_accuracy"], **more)
    return metrics
