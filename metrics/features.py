"""Feature extractors: frozen networks that turn images into the vectors that sets of images are compared by.

A number is worth only as much as its network and its resizing, so the protocol is part of every metric's name
(`adm_fid10k`, `classifier_fd300`), and two results are compared only if their extractors' `identity` is equal. The
network must be independent of the teacher: a run aligned with DINOv2 may be favoured by DINOv2's own features.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.reading import open_regular
from metrics.moments import Moments


@dataclass(frozen=True)
class Features:
    """An extractor's output for N images; None where its protocol lacks that output."""

    pool: np.ndarray  # (N, D) float32: for Fréchet distances, KID, precision and recall
    logits: np.ndarray | None = None  # (N, K) float32: for the Inception Score
    spatial: np.ndarray | None = None  # (N, 2023) float32: for sFID
    labels: np.ndarray | None = None  # (N,) int64: the predicted class

    def __len__(self) -> int:
        return len(self.pool)


class Extractor:
    """A frozen network that gives features by one protocol. Two results can be compared if their `identity` is equal."""

    protocol: str  # for the names of metrics

    def __init__(self, network: torch.nn.Module, weights_sha256: str, **facts):
        """`facts` say how images are prepared for the network: `resize`, …; JSON values only."""
        self.device = next(network.parameters()).device
        known = {"network": type(network).__name__, "weights_sha256": weights_sha256}
        self.identity = {"protocol": self.protocol, **known, **facts, "layout": "NHWC"}

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 3, H, W) uint8 -> pool, logits and spatial, as in `Features`, or as many of the three as the protocol has."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` where the protocol takes no images of this size."""

    def features(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """(N, H, W, 3) uint8, N >= 1 -> features, in full fp32."""
        with full_precision(self.device):
            reads = map(self.read, batches(images, batch_size, self.device))
            found = [[part.float().cpu() for part in parts] for parts in reads]
        return Features(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


class FeatureSet:
    """The features of a set of images that arrive chunk by chunk, in the order of their files.

    Pool features and logits are kept (82 + 40 MB for 10k images of Inception); spatial features become moments at once.
    """

    def __init__(self):
        self._chunks: list[Features] = []
        self.spatial: Moments | None = None  # of (N, 2023)

    def add(self, features: Features) -> "FeatureSet":
        """Add the next images' features; returns itself."""
        self._chunks.append(Features(features.pool, features.logits, None, features.labels))
        if features.spatial is not None:
            self.spatial = (self.spatial or Moments()).update(features.spatial)
        return self

    @classmethod
    def interleave(cls, parts: "Sequence[FeatureSet]", frames: int = 1) -> "FeatureSet":
        """Interleave the parts of n processes back into the order of the images: image i is image i // n of part i mod n.

        Of clips, so many `frames` stay together.
        """
        places = []
        for i, part in enumerate(parts):
            clip, frame = np.divmod(np.arange(len(part)), frames)
            places.append((clip * len(parts) + i) * frames + frame)
        order = np.argsort(np.concatenate(places))
        arrays = (_joined(parts, name) for name in ("pool", "logits", "labels"))
        pool, logits, labels = (None if array is None else array[order] for array in arrays)
        whole = cls().add(Features(pool, logits, None, labels))
        for part in parts:
            if part.spatial is not None:
                whole.spatial = (whole.spatial or Moments()).merge(part.spatial)
        return whole

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    pool = property(lambda self: _joined(self._chunks, "pool"))  # (N, D)
    logits = property(lambda self: _joined(self._chunks, "logits"))  # (N, K), or None
    labels = property(lambda self: _joined(self._chunks, "labels"))  # (N,), or None


def _joined(parts: Sequence[Features | FeatureSet], name: str) -> np.ndarray | None:
    arrays = [getattr(part, name) for part in parts]
    return None if any(array is None for array in arrays) else np.concatenate(arrays)


def batches(images: np.ndarray, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images (N, H, W, 3) uint8, N >= 1, as (b, 3, H, W) on the device, batch by batch; clips likewise, (N, F, H, W, 3).

    Raises ValueError for anything else.
    """
    if images.ndim not in (4, 5) or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images must be (N, H, W, 3) uint8, N >= 1, got {images.shape} {images.dtype}")
    for start in range(0, len(images), batch_size):
        yield torch.tensor(images[start : start + batch_size], device=device).movedim(-1, -3)


def sha256_of(*paths: Path) -> str:
    """The checksum of files, read one after the other; raises `UserError` for one that cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain fp32 without gradients: no autocast, no TF32 (cuDNN's default), all restored afterwards."""
    # `allow_tf32` would leave "ieee" where "none" was, and Dynamo, which guards on it, would compile the training anew.
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
