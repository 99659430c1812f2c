"""Linear probes of features: a ridge map to the teacher's tokens, and a linear classifier of an image's class.

Both are fitted on one half of the images and scored on the other, and need no head, so a base model can be probed too.
"""

import numpy as np
from numpy import ndarray

from metrics.similarity import NULLS, mispair, paired_cosine, split_by_image
from metrics.token_sums import mapped, parts, product_sum, token_pair

RIDGE_PENALTIES = tuple(10.0**e for e in range(-5, 4))  # relative to the mean variance of the features
PROBE_PENALTIES = tuple(10.0**e for e in range(-1, 6))
MIN_PROBED = 4  # images of a class, fitted and scored together


def ridge_alignment(
    x: ndarray, y: ndarray, *, seed: int, ridge: float | None = None
) -> tuple[dict[str, float | int], ndarray]:
    """Map tokens x (N, T, Dx) to the space of y (N, T, Dy) by ridge regression, fitted on half of the images.

    Returns numbers on the other half, and its projection (n_test, T, Dy), of the images `split_by_image` names for this
    seed. So a run without a head, or the base model, can be shown in the teacher's space.

    - cosine: `paired_cosine` of the projection with y; a map that only knows y's mean has more than 0, as `null_cosine` shows.
    - r2: the share of y's variance about the fit images' mean that the map explains; below 0 where the mean does better.
    - null_cosine, null_r2: the same of a map fitted on images paired at random, and reported alike.

    `ridge` is the penalty relative to the mean variance of x; 0 is plain least squares. None chooses one of `RIDGE_PENALTIES`
    for each map by images of the fit half alone, a quarter of them held back: with fewer fit images than channels, as
    there are at full size, a fixed small penalty overfits so that the map does worse than the mean.
    """
    x, y = token_pair(x, y)
    fit, test = split_by_image(len(x), seed)
    means = [side[fit].mean(axis=(0, 1), dtype=np.float64) for side in (x, y)]  # (Dx,), (Dy,)
    rng = np.random.default_rng([seed, 4])
    back = np.isin(np.arange(len(fit)), rng.permutation(len(fit))[: max(len(fit) // 4, 1)])  # (n_fit,)
    own = [product_sum(x, x, fit[half], fit[half], means[0], means[0]) for half in (~back, back)]
    whole, first = (np.linalg.eigh(gram) for gram in (own[0] + own[1], own[0]))

    def measure(fit_y: ndarray, test_y: ndarray) -> tuple[float, float, float, ndarray]:
        cross = [product_sum(x, y, fit[half], fit_y[half], *means) for half in (~back, back)]
        penalty = _best(first, cross[0], own[1], cross[1]) if ridge is None else ridge
        values, vectors = whole  # of the normal equations' matrix
        weights = _inverse(values, penalty)[:, None] * (vectors.T @ (cross[0] + cross[1]))  # (Dx, Dy)
        projected = mapped(x, test, means[0], vectors @ weights, y.dtype, means[1])
        wrong = spread = 0.0
        for part in parts(len(test)):
            truth = y[test_y[part]].astype(np.float64)
            wrong += ((truth - projected[part]) ** 2).sum()
            spread += ((truth - means[1]) ** 2).sum()
        return paired_cosine(projected, y[test_y]), float(1 - wrong / spread), penalty, projected

    cosine, r2, penalty, projected = measure(fit, test)
    null_cosine, null_r2, _, _ = measure(mispair(fit, rng), mispair(test, rng))
    numbers = {"cosine": cosine, "r2": r2, "null_cosine": null_cosine, "null_r2": null_r2}
    return numbers | {"ridge": penalty, "n_fit": len(fit), "n_test": len(test)}, projected


def probe_accuracy(features: ndarray, classes: ndarray, *, seed: int) -> dict[str, float | int] | None:
    """Accuracy of a linear classifier on features (N, D) of classes (N,), fitted on half of the images.

    Ridge regression to one-hot targets on standardised features, its penalty chosen by leave-one-out on the fit images: as
    robust with 1280 features and 500 images as with 60 and 5000, and seconds where logistic regression takes minutes. Scored
    on the other half, of the split that all metrics share. Only classes with `MIN_PROBED` images or more, some of them in
    either half, take part; None where fewer than two are left.

    Returns accuracy; null_accuracy, the mean over shuffles of the fit images' labels; chance, the accuracy of always naming
    the fit images' most frequent class; and num_classes, n_fit, n_test of what took part.
    """
    fit, test = split_by_image(len(features), seed)
    names, counts = np.unique(classes, return_counts=True)
    names = names[counts >= MIN_PROBED]
    names = names[np.isin(names, classes[fit]) & np.isin(names, classes[test])]
    if len(names) < 2:
        return None
    fit, test = (half[np.isin(classes[half], names)] for half in (fit, test))
    mean, std = features[fit].mean(axis=0, dtype=np.float64), features[fit].std(axis=0, dtype=np.float64)
    scaled = (features - mean) / np.where(std > 0, std, 1)  # (N, D)
    rng = np.random.default_rng([seed, 6])
    labels, truth = classes[fit], classes[test]

    def score(given: ndarray) -> float:
        from sklearn.linear_model import RidgeClassifierCV

        probe = RidgeClassifierCV(alphas=PROBE_PENALTIES).fit(scaled[fit], given)
        return float((probe.predict(scaled[test]) == truth).mean())

    found, counts = np.unique(labels, return_counts=True)
    null = float(np.mean([score(rng.permutation(labels)) for _ in range(NULLS)]))
    chance = float((truth == found[counts.argmax()]).mean())
    numbers = {"accuracy": score(labels), "null_accuracy": null, "chance": chance}
    return numbers | {"num_classes": len(names), "n_fit": len(fit), "n_test": len(test)}


def _best(gram, cross: ndarray, own_back: ndarray, cross_back: ndarray) -> float:
    """The penalty with the least squared error on the images held back, which their sums of products tell."""
    values, vectors = gram
    cross, cross_back = vectors.T @ cross, vectors.T @ cross_back  # (Dx, Dy) each
    own_back = vectors.T @ own_back @ vectors  # (Dx, Dx)

    def error(ridge: float) -> float:
        weights = _inverse(values, ridge)[:, None] * cross  # (Dx, Dy)
        return (weights * (own_back @ weights)).sum() - 2 * (weights * cross_back).sum()

    return min(RIDGE_PENALTIES, key=error)


def _inverse(values: ndarray, ridge: float) -> ndarray:
    """(Dx,) 1 / (value + penalty); with ridge 0 the features may be rank-deficient: no variance, no weight."""
    damped = values + ridge * values.mean()
    return np.where(damped > damped.max() * 1e-12, 1 / np.where(damped > 0, damped, 1), 0)
