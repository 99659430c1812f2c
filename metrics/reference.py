"""References: statistics of the real images that samples are compared with, and some of their features, in one file.

The file has the keys of ADM's reference files (mu, sigma, mu_s, sigma_s) beside its own; ADM's files can stand in its place.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError, one_line
from common.files import file_written_whole
from common.reading import open_regular, parse_record
from common.sides import as_kept, height_width, written
from metrics.features import Extractor, Features, FeatureSet
from metrics.moments import Moments, frechet_distance
from metrics.npz_images import DAMAGE, MEMBER, iterate_npz_images, npz_image_shape

KEPT = 10_000  # features kept for precision, recall and KID: what ADM's files hold
CODE_VERSION = 1  # to be raised when a change here or in an extractor would change numbers
CHUNK = 500  # images in memory at a time
FEWEST = 4  # images that a reference needs
KEYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "distance_of_halves", "metadata", "arr_0")
LARGEST = 2**31  # bytes of all its arrays, images aside
ROUNDING = 1e-5  # of a covariance, in units of its largest eigenvalue; float32 sums reach 1e-6


@with_config(ConfigDict(strict=True, extra="allow"))
class Metadata(TypedDict):
    """What a reference says of itself: this, and how its images and features were made."""

    protocol: str
    num_images: Annotated[int, Field(ge=FEWEST)]


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in an extractor's features; None where a file lacks them."""

    name: str  # the file's
    protocol: str
    pool: Moments  # over all images
    spatial: Moments | None
    features: np.ndarray | None  # (M, D) float32, M <= KEPT, spread at random over the set
    distance_of_halves: float | None  # Fréchet distance of two random halves of the real images, for scale
    metadata: dict

    @property
    def identity(self) -> dict:
        """The file's name, the checksum of its moments, and its metadata: two results can be compared if these are equal."""
        digest = hashlib.sha256()
        for moments in filter(None, (self.pool, self.spatial)):
            digest.update(moments.mean.tobytes() + moments.cov.tobytes())
        return {"name": self.name, "sha256": digest.hexdigest(), **self.metadata}

    def save(self, path: str | Path) -> None:
        """Write one .npz, whole or not at all."""
        arrays = {"metadata": json.dumps(self.metadata), "mu": self.pool.mean, "sigma": self.pool.cov}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.cov}
        rest = {"features": self.features, "distance_of_halves": self.distance_of_halves}
        with file_written_whole(path) as file:
            np.savez(file, **arrays, **{name: value for name, value in rest.items() if value is not None})


class ReferenceBuilder:
    """Collects a set of `count` images that arrive in any order, from any number of processes.

    Which features are kept, and which half an image belongs to, follows from its index alone.
    """

    def __init__(self, count: int, *, kept: int = KEPT, seed: int = 0):
        if count < FEWEST:
            raise UserError(f"a reference needs at least {FEWEST} images, there are {count}")
        rng = np.random.default_rng(seed)
        self._is_kept = rng.permutation(count) < kept  # (count,)
        self._first = rng.permutation(count) < count // 2  # (count,), at random: files may be sorted by class
        self._seen = np.zeros(count, bool)
        self._halves = (Moments(), Moments())
        self._spatial = Moments()
        self._features: list[tuple[np.ndarray, np.ndarray]] = []  # (indices, features)

    def add(self, features: Features, indices: np.ndarray) -> "ReferenceBuilder":
        """Add images; `indices` (N,) are their places in the set, 0 .. count - 1. Returns itself."""
        indices = np.asarray(indices)
        if len(indices) != len(features) or self._seen[indices].any() or len(set(indices)) != len(indices):
            raise ValueError("each image of the set must be added once, with its index")
        self._seen[indices] = True
        first, is_kept = self._first[indices], self._is_kept[indices]  # (N,)
        for half, in_half in zip(self._halves, (first, ~first), strict=True):
            if in_half.any():
                half.update(features.pool[in_half])
        if features.spatial is not None:
            self._spatial.update(features.spatial)
        self._features.append((indices[is_kept], features.pool[is_kept]))
        return self

    def merge(self, other: "ReferenceBuilder") -> "ReferenceBuilder":
        """Add the images that another process collected of the same set; returns itself."""
        if (self._seen & other._seen).any():
            raise ValueError("each image of the set must be added once")
        self._seen |= other._seen
        self._spatial.merge(other._spatial)
        for own, theirs in zip(self._halves, other._halves, strict=True):
            own.merge(theirs)
        self._features += other._features
        return self

    def finish(self, extractor: Extractor, metadata: dict, name: str = "reference.npz") -> Reference:
        """The reference of the whole set. `metadata` says what the images are: source, split, crop, size, ...; JSON values."""
        if not self._seen.all():
            raise ValueError(f"{(~self._seen).sum()} of {len(self._seen)} images were not added")
        indices, features = map(np.concatenate, zip(*self._features, strict=True))  # (M,), (M, D)
        kept = features[np.argsort(indices)]
        halves = frechet_distance(*self._halves)
        pool = Moments().merge(self._halves[0]).merge(self._halves[1])
        spatial = self._spatial if self._spatial.count else None
        facts = {"num_images": len(self._seen), "code_version": CODE_VERSION}
        metadata = {**extractor.identity, **facts, **metadata}
        return Reference(name, extractor.protocol, pool, spatial, kept, halves, metadata)


def protocol_of_file(path: str | Path) -> str:
    """The protocol that a reference serves; raises `UserError` for a file that is none."""
    arrays = _read_arrays(Path(path))
    return _metadata(path, arrays)["protocol"] if "metadata" in arrays else "adm"


def load_reference(path: str | Path, extractor: Extractor, wanted: dict | None = None) -> Reference:
    """The reference in a file, for this extractor; `wanted` are further metadata it must have.

    A file of ADM's (it has no metadata) serves the protocol `adm` alone: moments as it has them, or those of its images
    where it has none, as ADM does; features of its images are computed here. Anything that differs is a `UserError`.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    if "metadata" not in arrays:
        return _read_adm(path, arrays, extractor, wanted or {})
    metadata = _metadata(path, arrays)
    pool, spatial, features, halves = _statistics(path, arrays, metadata["num_images"])
    if pool is None:
        raise UserError(f"{path} is not a whole reference (it has no 'mu'): make it anew")
    conditions = {**extractor.identity, "code_version": CODE_VERSION, **(wanted or {})}
    for key, value in json.loads(json.dumps(conditions)).items():  # as JSON gives it back: no tuples
        if metadata.get(key) != value:
            raise UserError(
                f"{path} was made with {key} = {metadata.get(key)!r:.100}, wanted is {value!r}: make the reference anew or "
                "choose another file"
            )
    return Reference(path.name, extractor.protocol, pool, spatial, features, halves, metadata)


def _read_adm(path: Path, arrays: dict, extractor: Extractor, wanted: dict) -> Reference:
    """A reference file of ADM's suite, or one of its sample files."""
    if "arr_0" not in arrays and "mu_s" not in arrays:
        raise UserError(f"{path} does not say how it was made and is no reference file of ADM's suite")
    if extractor.protocol != "adm":
        raise UserError(
            f"{path} is a file of ADM's suite: it serves the protocol adm, not {extractor.protocol}; make a reference of images"
        )
    metadata, features = {"source": "ADM's suite"}, None
    pool, spatial, *_ = _statistics(path, arrays, None)
    if "arr_0" in arrays:
        count, height, width, *_ = npz_image_shape(path)
        if count < FEWEST:
            few = f"{count} images, a reference needs at least {FEWEST}"
            raise UserError(f"{path} holds {few}: choose another file")
        if height_width(size := wanted.get("size", height)) != (height, width):
            found = written(as_kept(height, width))
            raise UserError(
                f"{path} holds images of size = {found}, wanted is {written(size)}: choose another file"
            )
        metadata |= {"num_arr_0": count, "size": as_kept(height, width)}
        drawn = FeatureSet()
        for chunk in iterate_npz_images(path, CHUNK):
            drawn.add(extractor.features(chunk))
        features = drawn.pool
    metadata["moments"] = "of its images" if pool is None else "of the file"
    if pool is None:
        pool, spatial = Moments().update(features), drawn.spatial
    return Reference(path.name, extractor.protocol, pool, spatial, features, None, metadata)


def _metadata(path: str | Path, arrays: dict) -> Metadata:
    return parse_record(str(arrays["metadata"]), Metadata, f"the metadata of {path}", "make it anew")


def _statistics(path: Path, arrays: dict, count: int | None):
    """Pooled moments, spatial ones, features and the distance of halves; None for each that the file lacks.

    Raises `UserError` where they can be no statistics.
    """
    try:
        pool, spatial = (_moments(arrays, *keys, count) for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
        features, halves = arrays.get("features"), arrays.get("distance_of_halves")
        if pool is not None and features is not None:
            _check_real("features", features, (max(FEWEST, len(features)) if features.ndim else 0, pool.dim))
        if halves is not None:
            _check_real("distance_of_halves", halves, ())
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole reference ({one_line(error)}): make it anew") from None
    return pool, spatial, features, None if halves is None else float(halves)


def _moments(arrays: dict, mean: str, cov: str, count: int | None) -> Moments | None:
    """The moments under two keys; raises ValueError for a covariance that no vectors have."""
    if mean not in arrays:
        return None
    mu, sigma = arrays[mean], arrays[cov]
    _check_real(mean, mu, (mu.size,))
    _check_real(cov, sigma, (mu.size, mu.size))
    sigma = sigma.astype(np.float64)
    values = np.linalg.eigvalsh(sigma)  # (D,), rising; of the lower triangle
    allowed = ROUNDING * values[-1]
    if np.abs(sigma - sigma.T).max() > allowed or values[0] < -allowed:
        raise ValueError(f"'{cov}' is not symmetric and positive semi-definite")
    return Moments.of(mu, sigma, count)


def _check_real(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.dtype.kind != "f" or array.shape != shape or 0 in shape or not np.isfinite(array).all():
        raise ValueError(f"'{name}' must be finite floats of shape {shape}, it is {array.shape}")


def _read_arrays(path: Path) -> dict:
    """The arrays of a reference, but for images, whose place in the dict stays empty."""
    try:
        with open_regular(path) as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError("not an .npz")
            if sum(m.file_size for m in zipfile.ZipFile(raw).infolist() if m.filename != MEMBER) > LARGEST:
                raise ValueError("its arrays are too large")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {key: None if key == "arr_0" else file[key] for key in KEYS if key in file}
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read as a reference: {one_line(error)}") from None
