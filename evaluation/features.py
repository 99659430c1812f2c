"""Feature extractors: frozen networks that turn images into the vectors a Fréchet distance is taken between.

A number is worth only as much as its network, so the extractor's name is part of every metric's name
(`fd_classifier`). The network must be independent of the teacher: a run aligned with DINOv2 may be favoured
by DINOv2's own features.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from errors import UserError


class Extractor(Protocol):
    """What every extractor offers: a `name` for metric names, the feature `dim`, and `features`."""

    name: str
    dim: int

    def features(self, images: np.ndarray, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """(N, H, W, 3) uint8 -> features (N, dim) float32 and predicted labels (N,) int64."""
        ...


def load_extractor(path: str | Path, device: str | torch.device) -> Extractor:
    """Load the extractor stored at `path`; its own files say what it is, anything else is a `UserError`."""
    path = Path(path)
    kind = _kind(path)
    if kind not in LOADERS:
        raise UserError(
            f"{path} holds {kind!r}; a feature extractor is a transformers folder of an image classifier "
            "(config.json, model.safetensors, preprocessor_config.json)"
        )
    return LOADERS[kind](path, torch.device(device))


class ClassifierExtractor:
    """A transformers image classifier; its features are what its last linear layer reads."""

    name = "classifier"

    def __init__(self, model: torch.nn.Module, *, mean: list[float], std: list[float], size: tuple[int, int]):
        """`mean`, `std` per RGB channel, pixels in [0, 1]; `size` (height, width) is what the network sees."""
        outputs = model.config.num_labels
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == outputs]
        if not linears:
            raise UserError(f"{type(model).__name__} has no linear layer with {outputs} outputs to read from")
        self.model = model.eval().requires_grad_(False)
        self.head = linears[-1]
        self.dim = self.head.in_features
        self.size = size
        weight = self.head.weight
        self.mean = torch.tensor(mean, device=weight.device).view(1, 3, 1, 1)  # (1, 3, 1, 1)
        self.std = torch.tensor(std, device=weight.device).view(1, 3, 1, 1)  # (1, 3, 1, 1)

    @torch.no_grad()
    def features(self, images: np.ndarray, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """(N, H, W, 3) uint8 images -> features (N, dim) float32 and labels (N,) int64, in full fp32.

        The whole image is resized to the network's size (bicubic, antialiased, not re-quantised, as
        clean-fid does), never cropped: what lies at the border counts too.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
            raise ValueError(f"images must be (N, H, W, 3) uint8, N >= 1, got {images.shape} {images.dtype}")
        if images.shape[1] * self.size[1] != images.shape[2] * self.size[0]:
            raise ValueError(f"images {images.shape[1:3]} would be squashed to {self.size}")
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        labels = []
        try:
            with _full_precision(self.mean.device.type):
                for start in range(0, len(images), batch_size):
                    x = self._prepare(images[start : start + batch_size])  # (b, 3, h, w)
                    labels.append(self.model(pixel_values=x).logits.argmax(dim=-1).cpu())  # (b,)
                    seen[-1] = seen[-1].float().cpu()  # (b, dim)
        finally:
            handle.remove()
        features = torch.cat(seen)  # (N, dim)
        if features.shape != (len(images), self.dim):
            raise ValueError(f"expected features ({len(images)}, {self.dim}), got {tuple(features.shape)}")
        return features.numpy(), torch.cat(labels).numpy()

    def _prepare(self, images: np.ndarray) -> torch.Tensor:
        x = (
            torch.from_numpy(images.copy()).to(self.mean.device).permute(0, 3, 1, 2).float()
        )  # (b, 3, H, W) 0..255
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return (x / 255 - self.mean) / self.std  # (b, 3, h, w)


def _load_classifier(path: Path, device: torch.device) -> ClassifierExtractor:
    from transformers import AutoModelForImageClassification

    preprocessing = _read_json(path / "preprocessor_config.json")
    mean, std = preprocessing.get("image_mean"), preprocessing.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise UserError(
            f"{path / 'preprocessor_config.json'} must give image_mean and image_std for 3 channels"
        )
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be loaded as an image classifier: {reason}") from None
    if report["missing_keys"]:
        raise UserError(
            f"{path} lacks weights ({sorted(report['missing_keys'])[0]}, ...): they would be random"
        )
    return ClassifierExtractor(model.to(device), mean=mean, std=std, size=_network_size(path, preprocessing))


LOADERS: dict[str, Callable[[Path, torch.device], Extractor]] = {"classifier": _load_classifier}


def _kind(path: Path) -> str:
    """Name the kind of extractor at `path`: a key of LOADERS, or a word for the message."""
    if not path.exists():
        raise UserError(f"no feature extractor at {path}: no such folder")
    if not (path / "config.json").is_file():
        return "no config.json"
    architectures = _read_json(path / "config.json").get("architectures") or ["no architecture"]
    return "classifier" if architectures[0].endswith("ForImageClassification") else architectures[0]


def _network_size(path: Path, preprocessing: dict) -> tuple[int, int]:
    """(height, width) of what the network was trained on: the crop where there is one, else the resize."""
    size = preprocessing.get("crop_size", preprocessing.get("size"))
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    if not (isinstance(size, tuple) and all(isinstance(side, int) and side > 0 for side in size)):
        raise UserError(f"{path / 'preprocessor_config.json'} gives no usable size: {size!r}")
    return size


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Features in plain fp32: no autocast, no TF32 (cuDNN's default), both restored afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
