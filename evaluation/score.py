"""Measure images against references: read them once, extract features, and compute every metric of each extractor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch

from cache.image_list import Sample, clip_shape, read_samples
from cache.manifest import ids_digest, read_manifest
from cache.reader import FieldReader
from cache.views import UnreadableImage, read_view
from common.errors import UserError
from common.sides import Sides, as_kept, height_width
from configs.evaluation import Eval
from configs.schema import Config
from evaluation.image_files import clip_by_clip, files_in_chunks, image_chunks, image_files, watched
from evaluation.score_clips import read_clips
from metrics.extractors import load_extractors
from metrics.features import Extractor, FeatureSet
from metrics.npz_images import iterate_npz_images, npz_image_shape
from metrics.quality import named_classes, score
from metrics.reference import Reference, ReferenceBuilder, load_reference, protocol_of_file
from training.ranks import Ranks

CHUNK = 128  # images in memory at a time
READERS = 8  # threads that decode photographs


@dataclass(frozen=True)
class Scorer:
    """A feature extractor, and the statistics of the real images in its features."""

    extractor: Extractor
    reference: Reference

    def intended(self, shown: Sequence[int] | Sequence[str] | None) -> np.ndarray | None:
        """The classes (N,) that images were to show: these, or those of the extractor that their captions name."""
        if shown is None or not isinstance(shown[0], str):
            return None if shown is None else np.asarray(shown)
        return named_classes(shown, getattr(self.extractor, "names", ()))

    @property
    def identity(self) -> dict:
        """Two results can be compared if this is equal for both."""
        return {"extractor": self.extractor.identity, "reference": self.reference.identity}


def load_scorers(config: Config, device: torch.device, ranks: Ranks) -> list[Scorer]:
    """The scorers that a config's `eval` settings name.

    Their references are the given files (`eval.reference`), or are made of the training images once and kept beside `data.csv`.
    """
    extractors = load_extractors(config.eval.extractor, device, dinov2=config.eval.dinov2)
    size = read_manifest(config.data.latents, "latents")["view"]["size"]
    for extractor in extractors:
        extractor.check_size(*height_width(size))
    if config.eval.reference:
        return match_references(extractors, config.eval.reference, size)
    items, facts = training_images(config)
    suffixes = {e.protocol: f".{e.protocol}-{e.identity['weights_sha256'][:8]}.npz" for e in extractors}
    files = {protocol: config.data.csv.with_suffix(suffix) for protocol, suffix in suffixes.items()}
    if missing := [e for e in extractors if not ranks.on_main(files[e.protocol].exists)]:
        build_references(missing, items, facts, files, ranks)
    return [Scorer(e, load_reference(files[e.protocol], e, facts)) for e in extractors]


def match_references(extractors: Sequence[Extractor], files: Sequence[Path], size: Sides) -> list[Scorer]:
    """Pair each extractor with the reference file of its protocol.

    An extractor without a reference is left out, and a printed line says so. Raises `UserError` where none has one, or where a
    reference was made of images of another size than `size`.
    """
    known: dict[str, Path] = {}
    for file in files:
        protocol = protocol_of_file(file)
        if protocol in known:
            raise UserError(f"{known[protocol]} and {file} are both references for {protocol}: give one")
        known[protocol] = file
    scorers = []
    for extractor in extractors:
        if extractor.protocol in known:
            reference = load_reference(known[extractor.protocol], extractor, {"size": size})
            scorers.append(Scorer(extractor, reference))
        else:
            print(f"no reference for {extractor.protocol}: its columns are left out")
    if not scorers:
        wanted = " or ".join(e.protocol for e in extractors)
        raise UserError(f"none of the references is for {wanted}: {', '.join(map(str, files))}")
    return scorers


def measure(
    folder: Path,
    indices: Sequence[int],
    shown: Sequence[int] | Sequence[str] | None,
    scorers: Sequence[Scorer],
    settings: Eval,
    device: torch.device,
    ranks: Ranks,
    frames: int | None = None,
) -> dict[str, dict]:
    """{metric: {value, error, …}} of the images `indices` of a folder, in that order, or of all `frames` of its clips.

    `shown` are the classes that they show, or their captions, which have an accuracy by class where they name the classes of a
    classifier (`named_classes`).

    Several processes share the pass over the images, and the result equals that of one process.
    """
    own_indices, each = list(indices)[ranks.rank :: ranks.world], frames or 1
    chunks = clip_by_clip(folder, own_indices, frames) if frames else image_chunks(folder, own_indices, CHUNK)
    found = extract_features(scorers, chunks, each * len(indices), ranks)
    parts = ranks.gather([found])

    def scored() -> dict[str, dict]:
        whole = [FeatureSet.interleave(of_scorer, each) for of_scorer in zip(*parts, strict=True)]
        of_frames = None if shown is None else np.repeat(shown, each).tolist()
        return score_all(whole, scorers, settings, device, of_frames)

    return ranks.on_main(scored)


def extract_features(
    scorers: Sequence[Scorer], chunks: Iterable[np.ndarray], count: int, ranks: Ranks
) -> list[FeatureSet]:
    """Read the images once and extract each scorer's features. `count` is the number of images of all ranks together."""
    found = [FeatureSet() for _ in scorers]
    for images in watched(chunks, ranks, "features", count):
        for scorer, features in zip(scorers, found, strict=True):
            features.add(scorer.extractor.features(images))
    return found


def score_all(
    found: Sequence[FeatureSet],
    scorers: Sequence[Scorer],
    settings: Eval,
    device: torch.device,
    shown: Sequence[int] | Sequence[str] | None = None,
) -> dict[str, dict]:
    """The metrics of all scorers; `shown` are the classes or captions of the images, None where they are unknown."""
    how = {"bootstrap": settings.bootstrap, "seed": settings.seed, "device": device}
    metrics: dict[str, dict] = {}
    for scorer, features in zip(scorers, found, strict=True):
        intended = scorer.intended(shown)
        metrics |= score(features, scorer.reference, n=len(features), intended=intended, **how)
    return metrics


def measure_images(path: Path, settings: Eval, device: torch.device) -> dict:
    """{images, protocol, metrics} of a folder of images of one size, in the order of their names, or of an .npz file."""
    if not settings.reference:
        raise UserError(f"{path} has no training images to compare with: give eval.reference=FILE.npz")
    if path.suffix == ".npz":
        (count, height, width), chunks = npz_image_shape(path)[:3], iterate_npz_images(path, CHUNK)
    else:
        files = image_files(path)
        count, chunks = len(files), files_in_chunks(files, CHUNK)
        height, width = next(files_in_chunks(files[:1], 1)).shape[1:3]
    if count < 4:
        raise UserError(f"{path} holds {count} images: precision and recall need at least 4")
    extractors = load_extractors(settings.extractor, device, dinov2=settings.dinov2)
    scorers = match_references(extractors, settings.reference, as_kept(height, width))
    found = extract_features(scorers, chunks, count, Ranks(cpu=device.type == "cpu"))
    return {
        "images": str(path),
        "protocol": {"num_samples": count, "judges": {s.extractor.protocol: s.identity for s in scorers}},
        "metrics": score_all(found, scorers, settings, device),
    }


def make_references(
    source: Path, size: Sides, out: Path, settings: Eval, device: torch.device, ranks: Ranks
) -> list[Path]:
    """Write OUT.PROTOCOL.npz for each extractor and return their file paths.

    `source` is a CSV of script 1, or a folder of images and its subfolders; their central crops of `size` pixels are taken.
    """
    extractors = load_extractors(settings.extractor, device, dinov2=settings.dinov2)
    if source.is_file():
        items, facts = listed(read_samples(source), size, source)
    else:
        items = image_files(source)
        facts = image_facts([str(path.relative_to(source)) for path in items], size, source)
    stem = out.name.removesuffix(".npz")
    files = {e.protocol: out.with_name(f"{stem}.{e.protocol}.npz") for e in extractors}
    build_references(extractors, items, facts, files, ranks)
    return list(files.values())


def training_images(config: Config) -> tuple[list[Path] | list[Sample], dict]:
    """`listed` of the training images or clips."""
    manifest = read_manifest(config.data.latents, "latents")
    cached = set(FieldReader(config.data.latents, "latents").ids)
    items = [item for item in read_samples(config.data.csv) if item.id in cached]
    return listed(items, manifest["view"]["size"], config.data.csv)


def listed(items: list[Sample], size: Sides, source: Path) -> tuple[list[Path] | list[Sample], dict]:
    """The files of images, or the clips themselves, and the facts that a reference records of them."""
    facts = image_facts([item.id for item in items], size, source)
    if (clip := clip_shape(items)) is None:
        return [item.img_path for item in items], facts
    return items, facts | {"num_images": len(items) * clip[0], "frames": clip[0], "fps": clip[1]}


def image_facts(ids: Sequence[str], size: Sides, source: Path) -> dict:
    """What a reference records of the images that it was made of."""
    facts = {"num_images": len(ids), "size": size, "crop": "centre", "source": source.name}
    return facts | {"ids_sha256": ids_digest(ids)}


def photographs(paths: Sequence[Path], size: Sides) -> Iterator[np.ndarray]:
    """Photographs cut to the crops that the VAE encoded, uint8 `(n, H, W, 3)`, chunk by chunk."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), CHUNK):
            try:
                chunk = paths[start : start + CHUNK]
                yield np.stack(list(pool.map(read_view, chunk, [size] * len(chunk))))
            except UnreadableImage as error:
                raise UserError(f"the real images are needed once more: {error}") from None


def build_references(
    extractors: Sequence[Extractor],
    items: Sequence[Path] | Sequence[Sample],
    facts: dict,
    files: Mapping[str, Path],
    ranks: Ranks,
) -> None:
    """Write a reference for each extractor to the file of its protocol, from one reading of the images or clips.

    Each rank reads every n-th of them. Each frame of a clip counts as an image.
    """
    own_items, frames, size = items[ranks.rank :: ranks.world], facts.get("frames", 1), facts["size"]
    own_indices = np.arange(len(items) * frames).reshape(-1, frames)[ranks.rank :: ranks.world].ravel()
    builders = [ReferenceBuilder(len(items) * frames) for _ in extractors]
    real = read_clips(own_items, size) if "frames" in facts else photographs(own_items, size)
    for images in watched(real, ranks, "real images", len(items) * frames):
        done, own_indices = own_indices[: len(images)], own_indices[len(images) :]
        for extractor, builder in zip(extractors, builders, strict=True):
            builder.add(extractor.features(images), done)
    for extractor, parts in zip(extractors, zip(*ranks.gather([builders]), strict=True), strict=True):
        reference = reduce(ReferenceBuilder.merge, parts).finish(extractor, facts)
        ranks.on_main(lambda: reference.save(files[reference.protocol]))  # noqa: B023 (called at once)
