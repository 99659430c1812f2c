"""Measure images: their features in one pass, then every metric that a network's features allow, against a reference."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cache.image_list import read_samples
from cache.manifest import ids_digest, read_manifest
from cache.reader import FieldReader
from cache.views import UnreadableImage, read_view
from common.errors import UserError
from configs.evaluation import Eval
from configs.schema import Config
from evaluation.image_files import files_in_chunks, image_chunks, image_files
from metrics.extractors import load_extractors
from metrics.features import Extractor, FeatureSet
from metrics.npz_images import iterate_npz_images, npz_image_shape
from metrics.quality import score
from metrics.reference import Reference, ReferenceBuilder, load_reference, protocol_of_file
from training.ranks import Ranks

CHUNK = 128  # images in memory at a time
READERS = 8  # threads that decode photographs


@dataclass(frozen=True)
class Judge:
    """A network that sees images, and the statistics of the real ones in its features."""

    extractor: Extractor
    reference: Reference

    @property
    def identity(self) -> dict:
        """What two results must share to be compared."""
        return {"extractor": self.extractor.identity, "reference": self.reference.identity}


def judges_of(config: Config, chosen: Eval, device: torch.device, ranks: Ranks) -> list[Judge]:
    """The judges that the settings name, each with its reference: given, kept beside `data.csv`, or made of the training images
    and kept there."""
    extractors = load_extractors(chosen.extractor, device, dinov2=chosen.dinov2)
    if chosen.reference:
        size = read_manifest(config.data.latents, "latents")["view"]["size"]
        return given_judges(extractors, chosen.reference, size)
    paths, facts = training_images(config)
    files = {e.protocol: reference_file(config, e) for e in extractors}
    if missing := [e for e in extractors if not ranks.on_main(files[e.protocol].exists)]:
        for reference in build_references(missing, paths, facts, ranks):
            ranks.on_main(lambda: reference.save(files[reference.protocol]))  # noqa: B023 (called at once)
    return [Judge(e, load_reference(files[e.protocol], e, facts)) for e in extractors]


def reference_file(config: Config, extractor: Extractor) -> Path:
    """Where the statistics of the training images in an extractor's features are kept: beside their list."""
    return config.data.csv.with_suffix(
        f".{extractor.protocol}-{extractor.identity['weights_sha256'][:8]}.npz"
    )


def given_judges(extractors: Sequence[Extractor], files: Sequence[Path], size: int) -> list[Judge]:
    """Each extractor with that of the reference files which is of its protocol; one without is left out, and said so. Raises
    `UserError` for references of images of another size than `size`."""
    known: dict[str, Path] = {}
    for file in files:
        protocol = protocol_of_file(file)
        if protocol in known:
            raise UserError(f"{known[protocol]} and {file} are both references for {protocol}: give one")
        known[protocol] = file
    judges = [
        Judge(e, load_reference(known[e.protocol], e, {"size": size}))
        for e in extractors
        if e.protocol in known
    ]
    if not judges:
        raise UserError(
            f"none of the references is for {' or '.join(e.protocol for e in extractors)}: {', '.join(map(str, files))}"
        )
    for extractor in extractors:
        if extractor.protocol not in known:
            print(f"no reference for {extractor.protocol}: its columns are left out")
    return judges


def measure(
    folder: Path,
    indices: Sequence[int],
    labels: Sequence[int],
    judges: Sequence[Judge],
    chosen: Eval,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, dict]:
    """{metric: {value, error, …}} of the images `indices` of a folder, in that order; `labels` are the classes they show.

    Several processes share the pass over the images; the result is that of one.
    """
    mine = list(indices)[ranks.rank :: ranks.world]
    found = features_of(judges, image_chunks(folder, mine, CHUNK), len(indices), ranks)
    stripes = ranks.gather([found])
    return ranks.on_main(
        lambda: score_all(
            [FeatureSet.of_stripes(s) for s in zip(*stripes, strict=True)], judges, chosen, device, labels
        )
    )


def features_of(
    judges: Sequence[Judge], chunks: Iterable[np.ndarray], count: int, ranks: Ranks
) -> list[FeatureSet]:
    """What each judge sees in the images: one reading of them, of which this rank does its share."""
    found = [FeatureSet() for _ in judges]
    with tqdm(desc="features", total=count, unit="image", leave=False, disable=not ranks.main) as bar:
        for images in chunks:
            for judge, features in zip(judges, found, strict=True):
                features.add(judge.extractor.features(images))
            bar.update(min(ranks.world * len(images), bar.total - bar.n))
    return found


def score_all(
    found: Sequence[FeatureSet],
    judges: Sequence[Judge],
    chosen: Eval,
    device: torch.device,
    labels: Sequence[int] | None = None,
) -> dict[str, dict]:
    """The metrics of all judges; `labels` (None where nobody knows) are the classes that the images were to show."""
    metrics: dict[str, dict] = {}
    for judge, features in zip(judges, found, strict=True):
        metrics |= score(
            features,
            judge.reference,
            n=len(features),
            bootstrap=chosen.bootstrap,
            seed=chosen.seed,
            intended=None if labels is None else np.asarray(labels),
            device=device,
        )
    return metrics


def measure_images(path: Path, chosen: Eval, device: torch.device) -> dict:
    """{images, protocol, metrics} of a folder of images of one size, in the order of their names, or of an .npz of them."""
    if not chosen.reference:
        raise UserError(f"{path} has no training images to compare with: give eval.reference=FILE.npz")
    if path.suffix == ".npz":
        (count, height, width), chunks = npz_image_shape(path)[:3], iterate_npz_images(path, CHUNK)
    else:
        files = image_files(path)
        count, chunks = len(files), files_in_chunks(files, CHUNK)
        height, width = next(files_in_chunks(files[:1], 1)).shape[1:3]
    if count < 4:
        raise UserError(f"{path} holds {count} images: precision and recall need at least 4")
    if height != width:
        raise UserError(f"the images of {path} are {width} × {height}: squares are compared, cut them first")
    extractors = load_extractors(chosen.extractor, device, dinov2=chosen.dinov2)
    judges = given_judges(extractors, chosen.reference, height)
    found = features_of(judges, chunks, count, Ranks(cpu=device.type == "cpu"))
    return {
        "images": str(path),
        "protocol": {"num_samples": count, "judges": {j.extractor.protocol: j.identity for j in judges}},
        "metrics": score_all(found, judges, chosen, device),
    }


def make_references(
    source: Path, size: int, out: Path, chosen: Eval, device: torch.device, ranks: Ranks
) -> list[Path]:
    """Write OUT.PROTOCOL.npz of the images of a CSV of script 1, or of a folder and its subfolders, cut to squares of `size`;
    returns their paths."""
    extractors = load_extractors(chosen.extractor, device, dinov2=chosen.dinov2)
    if source.suffix == ".csv":
        samples = read_samples(source)
        paths, digest = [sample.img_path for sample in samples], ids_digest(sample.id for sample in samples)
    else:
        paths = image_files(source)
        digest = ids_digest(str(path.relative_to(source)) for path in paths)
    facts = {
        "num_images": len(paths),
        "size": size,
        "crop": "centre",
        "source": source.name,
        "ids_sha256": digest,
    }
    written = []
    for reference in build_references(extractors, paths, facts, ranks):
        file = out.with_name(f"{out.name.removesuffix('.npz')}.{reference.protocol}.npz")
        ranks.on_main(lambda: reference.save(file))  # noqa: B023 (called at once)
        written.append(file)
    return written


def training_images(config: Config) -> tuple[list[Path], dict]:
    """The training images, and what a reference must say of the images that it was made of."""
    manifest = read_manifest(config.data.latents, "latents")
    cached = set(FieldReader(config.data.latents, "latents").ids)
    samples = [sample for sample in read_samples(config.data.csv) if sample.id in cached]
    facts = {
        "num_images": len(samples),
        "size": manifest["view"]["size"],
        "crop": "centre",
        "source": config.data.csv.name,
        "ids_sha256": ids_digest(sample.id for sample in samples),
    }
    return [sample.img_path for sample in samples], facts


def photographs(paths: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    """Photographs cut as the VAE saw them, uint8 `(n, S, S, 3)`, chunk by chunk."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), CHUNK):
            try:
                yield np.stack(
                    list(pool.map(lambda path: read_view(path, size), paths[start : start + CHUNK]))
                )
            except UnreadableImage as error:
                raise UserError(f"the real images are needed once more: {error}") from None


def build_references(
    extractors: Sequence[Extractor], paths: Sequence[Path], facts: dict, ranks: Ranks
) -> list[Reference]:
    """A reference for each extractor from one reading of the images, of which each rank does its stripe."""
    mine = np.arange(ranks.rank, len(paths), ranks.world)
    builders = [ReferenceBuilder(len(paths)) for _ in extractors]
    with tqdm(desc="real images", total=len(paths), unit="image", leave=False, disable=not ranks.main) as bar:
        for images in photographs([paths[i] for i in mine], facts["size"]):
            done, mine = mine[: len(images)], mine[len(images) :]
            for extractor, builder in zip(extractors, builders, strict=True):
                builder.add(extractor.features(images), done)
            bar.update(min(ranks.world * len(images), bar.total - bar.n))
    made = []
    for extractor, parts in zip(extractors, zip(*ranks.gather([builders]), strict=True), strict=True):
        whole = parts[0]
        for part in parts[1:]:
            whole.merge(part)
        made.append(whole.finish(extractor, facts))
    return made
