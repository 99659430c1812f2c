"""A linear probe: how well a linear classifier reads an image's class from frozen features."""

import numpy as np

from metrics.similarity import NULLS, split_by_image

MIN_IMAGES = 4  # of a class, fitted and scored together
PENALTIES = tuple(10.0**e for e in range(-1, 6))


def probe_accuracy(features: np.ndarray, classes: np.ndarray, *, seed: int) -> dict[str, float | int] | None:
    """Accuracy of a linear classifier on features (N, D) of classes (N,), fitted on half of the images.

    Ridge regression to one-hot targets on standardised features, its penalty chosen by leave-one-out on the fit images: as
    robust with 1280 features and 500 images as with 60 and 5000, and seconds where logistic regression takes minutes. Scored
    on the other half, of the split that all metrics share. Only classes with `MIN_IMAGES` images or more, some of them in
    either half, take part; None where fewer than two are left.

    Returns accuracy; null_accuracy, the mean over shuffles of the fit images' labels; chance, the accuracy of always naming
    the fit images' most frequent class; and num_classes, n_fit, n_test of what took part.
    """
    if features.ndim != 2 or len(features) != len(classes):
        raise ValueError(f"features must be (N, D) and classes (N,), got {features.shape}, {classes.shape}")
    fit, test = split_by_image(len(features), seed)
    names, counts = np.unique(classes, return_counts=True)
    names = names[counts >= MIN_IMAGES]
    names = names[np.isin(names, classes[fit]) & np.isin(names, classes[test])]
    if len(names) < 2:
        return None
    fit, test = (half[np.isin(classes[half], names)] for half in (fit, test))
    mean, std = features[fit].mean(axis=0, dtype=np.float64), features[fit].std(axis=0, dtype=np.float64)
    scaled = (features - mean) / np.where(std > 0, std, 1)  # (N, D)
    rng = np.random.default_rng([seed, 6])
    labels, truth = classes[fit], classes[test]
    found = np.unique(labels, return_counts=True)
    return {
        "accuracy": _score(scaled[fit], labels, scaled[test], truth),
        "null_accuracy": float(
            np.mean([_score(scaled[fit], rng.permutation(labels), scaled[test], truth) for _ in range(NULLS)])
        ),
        "chance": float((truth == found[0][found[1].argmax()]).mean()),
        "num_classes": len(names),
        "n_fit": len(fit),
        "n_test": len(test),
    }


def _score(x_fit: np.ndarray, labels: np.ndarray, x_test: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.linear_model import RidgeClassifierCV

    probe = RidgeClassifierCV(alphas=PENALTIES).fit(x_fit, labels)
    return float((probe.predict(x_test) == truth).mean())
