"""Extractors from transformers folders: an image classifier, and DINOv2's CLS token."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

from common.errors import UserError
from metrics.features import Extractor, Features, batches, check_images, full_precision, sha256_of

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
DINOV2_SIDE = 224  # pixels, as edm2's FD_DINOv2


class FolderExtractor:
    """The part that both extractors share: how images are prepared, and the identity of the network."""

    protocol: str

    def __init__(self, model: torch.nn.Module, sha256: str, *, mean: list, std: list, size: tuple[int, int]):
        """`mean`, `std` per RGB channel, pixels in [0, 1]; `size` (height, width) is the size of the network's input."""
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.size = size
        self.mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)  # (1, 3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)  # (1, 3, 1, 1)
        self.identity = {
            "protocol": self.protocol,
            "network": type(model).__name__,
            "weights_sha256": sha256,
            "resize": f"bicubic antialiased to {size[0]} x {size[1]}",
            "mean": list(mean),
            "std": list(std),
            "layout": "NHWC",
        }

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) uint8 -> (b, 3, h, w), normalised.

        The whole image is resized to the network's size (bicubic, antialiased, not re-quantised), never cropped: what lies at
        the border counts too.
        """
        x = images.float()  # (b, 3, H, W) 0..255
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return (x / 255 - self.mean) / self.std  # (b, 3, h, w)

    def check(self, images: np.ndarray) -> None:
        """Check that images have the proportions that the network expects."""
        check_images(images)
        if images.shape[1] * self.size[1] != images.shape[2] * self.size[0]:
            raise ValueError(f"images {images.shape[1:3]} would be squashed to {self.size}")


class ClassifierExtractor(FolderExtractor):
    """A transformers image classifier; its features are the input of its last linear layer."""

    protocol = "classifier"

    def __init__(self, model: torch.nn.Module, sha256: str, **preparation):
        super().__init__(model, sha256, **preparation)
        outputs = model.config.num_labels
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == outputs]
        if not linears:
            raise UserError(f"{type(model).__name__} has no linear layer with {outputs} outputs to read from")
        self.head = linears[-1]

    def features(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """(N, H, W, 3) uint8 -> pool (N, D), logits (N, K) and labels (N,)."""
        self.check(images)
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        logits = []
        try:
            with full_precision(self.device):
                for batch in batches(images, batch_size, self.device):
                    logits.append(self.model(pixel_values=self.prepare(batch)).logits.float().cpu())  # (b, K)
                    seen[-1] = seen[-1].float().cpu()  # (b, D)
        finally:
            handle.remove()
        pool, logits = torch.cat(seen).numpy(), torch.cat(logits).numpy()  # (N, D), (N, K)
        if pool.shape != (len(images), self.head.in_features):
            raise ValueError(f"expected features {(len(images), self.head.in_features)}, got {pool.shape}")
        return Features(pool, logits, None, logits.argmax(axis=-1))


class Dinov2Extractor(FolderExtractor):
    """DINOv2's CLS token after the last LayerNorm: the features of FD_DINOv2 (Stein et al. 2023; edm2).

    A run that was aligned with DINOv2 may be favoured by it, so it stands beside another extractor, never alone.
    """

    protocol = "dinov2"

    def features(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """(N, H, W, 3) uint8 -> pool (N, D)."""
        self.check(images)
        with full_precision(self.device):
            pools = [
                self.model(self.prepare(batch)).last_hidden_state[:, 0].float().cpu()  # (b, D)
                for batch in batches(images, batch_size, self.device)
            ]
        return Features(torch.cat(pools).numpy())


def load_classifier(path: Path, device: torch.device) -> Extractor:
    """Load an image classifier from a transformers folder; raises `UserError` for a folder of anything else."""
    from transformers import AutoModelForImageClassification

    kind = _architecture(path)
    if kind.startswith("Dinov2"):
        raise UserError(
            f"{path} holds {kind!r}: DINOv2 is given beside another extractor, never alone, since a run aligned with DINOv2 "
            "may be favoured by it"
        )
    if not kind.endswith("ForImageClassification"):
        raise UserError(
            f"{path} holds {kind!r}; a feature extractor is 'inception', a .pth of Inception's weights, or a transformers "
            "folder of an image classifier (config.json, model.safetensors, preprocessor_config.json)"
        )
    preprocessing = _read_json(path / "preprocessor_config.json")
    mean, std = _normalisation(path, preprocessing)
    size = _network_size(path, preprocessing)
    model, sha256 = _load(AutoModelForImageClassification, path, "an image classifier")
    return ClassifierExtractor(model.to(device), sha256, mean=mean, std=std, size=size)


def load_dinov2(path: Path, device: torch.device) -> Extractor:
    """Load DINOv2 from a transformers folder; raises `UserError` for a folder of anything else."""
    from transformers import AutoModel

    kind = _architecture(path)
    if kind not in ("Dinov2Model", "Dinov2WithRegistersModel"):
        raise UserError(f"{path} holds {kind!r}; a transformers folder of a Dinov2Model was expected")
    mean, std, side = IMAGENET_MEAN, IMAGENET_STD, DINOV2_SIDE
    native = _read_json(path / "config.json").get("image_size", DINOV2_SIDE)
    size = (min(side, native),) * 2
    if (path / "preprocessor_config.json").exists():
        preprocessing = _read_json(path / "preprocessor_config.json")
        mean, std = _normalisation(path, preprocessing)
        if native < DINOV2_SIDE:  # a small model: what it was trained on
            size = _network_size(path, preprocessing)
    model, sha256 = _load(AutoModel, path, "DINOv2")
    return Dinov2Extractor(model.to(device), sha256, mean=mean, std=std, size=size)


def _load(loader: type, path: Path, what: str) -> tuple[torch.nn.Module, str]:
    """Load the whole model; returns it with the checksum of its weights."""
    logging.disable_progress_bar()
    try:
        model, report = loader.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be loaded as {what}: {reason}") from None
    if report["missing_keys"]:
        raise UserError(
            f"{path} lacks weights ({sorted(report['missing_keys'])[0]}, ...): they would be random"
        )
    return model, sha256_of(*sorted(path.glob("*.safetensors")))


def _architecture(path: Path) -> str:
    """The architecture that the folder's config.json names, or the words that say what is missing."""
    if not path.exists():
        raise UserError(f"no feature extractor at {path}: no such folder")
    if not (path / "config.json").is_file():
        return "no config.json"
    return (_read_json(path / "config.json").get("architectures") or ["no architecture"])[0]


def _normalisation(path: Path, preprocessing: dict) -> tuple[list[float], list[float]]:
    mean, std = preprocessing.get("image_mean"), preprocessing.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise UserError(
            f"{path / 'preprocessor_config.json'} must give image_mean and image_std for 3 channels"
        )
    return mean, std


def _network_size(path: Path, preprocessing: dict) -> tuple[int, int]:
    """(height, width) of the images that the network was trained on: the crop if there is one, else the resize."""
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
