"""Joint embeddings of a network's projected tokens and the teacher's in the plane, by t-SNE or UMAP.

A mere offset or scale separates two clouds, and distances between clusters mean nothing. So both sides are L2-normalised, each
source is drawn as it is and again with each side centred by itself, and the meaningful numbers stand below.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from common.errors import UserError
from metrics.similarity import cknna, mispair, paired_cosine, unit

TOKENS = 400  # drawn, a side
MAX_CLASSES = 10
COMPONENTS = 50


@dataclass(frozen=True)
class Source:
    """Held-out images' tokens in the teacher's space, `projected` beside the `teacher`'s."""

    projected: ndarray  # (n, T, D)
    teacher: ndarray  # (n, T, D)
    classes: ndarray  # (n,)


@dataclass(frozen=True)
class Panel(Source):
    """One scatter plot: M tokens of a source in the plane, (M, 2) with classes (M,), and the numbers of its caption."""

    numbers: Mapping[str, float | int]


def embed_sources(
    sources: Mapping[str, Source], *, seed: int, method: str = "tsne"
) -> dict[str, dict[str, Panel]]:
    """{source: {"raw": Panel, "centred": Panel}}; both panels show the same tokens, of ten classes at most."""
    kinds = ("raw", "centred")
    return {
        n: {kind: _panel(s, kind == "centred", seed, method) for kind in kinds} for n, s in sources.items()
    }


def _panel(source: Source, centre: bool, seed: int, method: str) -> Panel:
    few = np.unique(source.classes)[:MAX_CLASSES]
    cells = source.projected.shape[1]
    images, places = np.nonzero(np.isin(source.classes, few)[:, None] & np.ones(cells, bool))
    rng = np.random.default_rng([seed, 7])
    drawn = rng.permutation(len(images))[:TOKENS]
    images, places = images[drawn], places[drawn]
    x, y = (_prepared(side[images, places], centre) for side in (source.projected, source.teacher))  # (M, D)
    means = (_prepared(side.mean(axis=1), centre) for side in (source.projected, source.teacher))  # (n, D)
    shared = cknna(*means, k=min(10, len(source.classes) - 4), seed=seed)
    plane = joint_embedding(x, y, seed, method=method)  # (2, M, 2)
    mispaired = y[mispair(np.arange(len(y)), rng)]
    numbers = {"paired_cosine": paired_cosine(x, y), "null_paired_cosine": paired_cosine(x, mispaired)}
    numbers |= {name: shared[name] for name in ("cknna", "null_cknna")}
    numbers |= {"cknna_images": shared["n"], "cknna_k": shared["k"]}
    numbers |= {"tokens": len(x), "images": len(np.unique(images))}
    return Panel(*plane, source.classes[images], numbers)


def joint_embedding(x: ndarray, y: ndarray, seed: int, *, method: str = "tsne") -> ndarray:
    """Embed tokens x (M, D) and y (M, D) jointly in the plane by "tsne" or "umap"; returns (2, M, 2): x's points, then y's.

    Both sides are L2-normalised, then reduced to 50 principal components or fewer.
    """
    points = np.concatenate([unit(x), unit(y)])  # (2M, D)
    points = points - points.mean(axis=0)
    _, _, directions = np.linalg.svd(points, full_matrices=False)
    points = points @ directions[:COMPONENTS].T  # (2M, min(50, D, 2M))
    if method == "umap":
        from umap import UMAP

        solver = UMAP(n_neighbors=min(15, len(points) - 1), random_state=seed, n_jobs=1)
    else:
        from sklearn.manifold import TSNE

        solver = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=seed)
    return solver.fit_transform(points).reshape(2, len(x), 2)


def check_installed(method: str) -> None:
    """Raise `UserError` for UMAP where its package, which nothing else needs, is not installed."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError("--embedding umap needs a package of its own: pip install umap-learn")


def _prepared(x: ndarray, centre: bool) -> ndarray:
    """L2-normalised (M, D) in float64; with `centre`, about their mean."""
    x = unit(x.astype(np.float64))
    return unit(x - x.mean(axis=0)) if centre else x
