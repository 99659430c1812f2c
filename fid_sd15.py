"""The Fréchet distance between a run's samples and the real training images."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.schema import Config
from errors import UserError
from evaluation.features import Extractor
from evaluation.metrics import class_accuracy
from evaluation.moments import Moments, frechet_distance
from evaluation.sampling import balanced_labels, load_images
from preprocessing.images import UnreadableImage, read_view
from preprocessing.manifest import read_manifest
from preprocessing.reader import FieldReader
from preprocessing.samples import read_samples
from sample_sd15 import manifest_of

CHUNK = 500  # images in memory at a time


@dataclass(frozen=True)
class Reference:
    """Moments of the real images, and of two random halves of them, whose distance gives the scale."""

    real: Moments = field(default_factory=Moments)
    halves: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))


def read_reference(config: Config, extractor: Extractor) -> Reference:
    """The moments of the training images, cut as the VAE saw them."""
    reference, coin = Reference(), np.random.default_rng(0)
    for images in _real_images(config):
        features = extractor.features(images).pool  # (n, D)
        reference.real.update(features)
        first = coin.random(len(features)) < 0.5  # not every other one: rows go round the classes
        for half, chosen in zip(reference.halves, (first, ~first), strict=True):
            if chosen.any():
                half.update(features[chosen])
    return reference


def measure_distance(folder: Path, protocol: dict, extractor: Extractor, reference: Reference) -> dict:
    """Distance and class accuracy of the samples that `draw_samples` put into `folder`.

    `conditions` in the result is what two results must share to be compared: the protocol but for its step, the metric's name,
    and the number of real images.
    """
    n = protocol["num_samples"]
    drawn, predicted = Moments(), []
    for start in range(0, n, CHUNK):
        features = extractor.features(load_images(folder, min(CHUNK, n - start), start=start))
        drawn.update(features.pool)
        predicted += features.labels.tolist()
    conditions = {name: value for name, value in protocol.items() if name != "step"}
    return {
        "step": protocol["step"],
        "value": frechet_distance(drawn, reference.real),
        "value_of_real_halves": frechet_distance(*reference.halves),
        "class_accuracy": class_accuracy(predicted, balanced_labels(n, manifest_of(folder)["n_classes"])),
        "num_samples": n,
        "samples": str(folder),
        "conditions": conditions | {"metric": f"fd_{extractor.protocol}", "num_real": reference.real.count},
    }


def _real_images(config: Config) -> Iterator[np.ndarray]:
    """The training images as uint8 `(n, S, S, 3)`, chunk by chunk."""
    size = read_manifest(config.data.latents, "latents")["view"]["size"]
    cached = set(FieldReader(config.data.latents, "latents").ids)
    paths = [sample.img_path for sample in read_samples(config.data.csv) if sample.id in cached]
    try:
        for start in range(0, len(paths), CHUNK):
            yield np.stack([read_view(path, size) for path in paths[start : start + CHUNK]])
    except UnreadableImage as error:
        raise UserError(f"the real images are needed again: {error}") from None
