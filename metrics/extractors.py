"""The feature extractors that the settings name: Inception, or an image classifier of a transformers folder, and DINOv2."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pydantic import Field

from common.errors import UserError
from common.pretrained import SAVED, PixelStatistics, load_pretrained, read_config
from common.reading import read_record
from common.sides import same_aspect
from metrics.features import Extractor, Features, sha256_of
from metrics.inception import find_weights, load_inception

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
DINOV2_SIDE = 224  # pixels, as edm2's FD_DINOv2
MAX_FRAMES = 1024  # of a clip
PREPARATION = "preprocessor_config.json"
Side = Annotated[int, Field(gt=0)]
Size = Side | dict[str, Side | None]


class Preparation(PixelStatistics):
    """What is read of preprocessor_config.json; sizes are in pixels."""

    size: NotRequired[Size]
    crop_size: NotRequired[Size]


def load_extractors(
    setting: str | Path, device: str | torch.device, *, dinov2: str | Path | None = None
) -> list[Extractor]:
    """The extractors that a setting names; all can be fed by one reading of the images.

    "inception", or a .pth of its weights: the protocols "adm" and "clean", which share one network. A transformers folder of an
    image classifier: "classifier". `dinov2` is a transformers folder whose features are given beside these, never alone.
    Nothing is ever downloaded; raises `UserError` for files that are missing or of another kind.
    """
    device = torch.device(device)
    if str(setting) == "inception" or Path(setting).suffix == ".pth":
        extractors = load_inception(find_weights(setting), device)
    else:
        extractors = [load_classifier(_folder(setting), device)]
    return extractors if dinov2 is None else [*extractors, load_dinov2(_folder(dinov2), device)]


class FolderExtractor(Extractor):
    """The part that both extractors share: how images are prepared, and the identity of the network."""

    def __init__(self, model: torch.nn.Module, sha256: str, *, mean: list, std: list, size: tuple[int, int]):
        """`mean`, `std` per RGB channel, pixels in [0, 1]; `size` (height, width) is the size of the network's input."""
        resize = f"bicubic antialiased to {size[0]} x {size[1]}"
        super().__init__(model, sha256, resize=resize, mean=list(mean), std=list(std))
        self.model, self.size = model.eval().requires_grad_(False), size
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (mean, std))

    def check_size(self, height: int, width: int) -> None:
        if not same_aspect((height, width), self.size):
            raise UserError(
                f"{self.protocol} takes images of the shape {self.size[1]} × {self.size[0]}, and {width} × {height} would be "
                "squashed: measure them by eval.extractor=inception alone, whose protocols squash by themselves"
            )

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) uint8 -> (b, 3, h, w), normalised.

        The whole image is resized to the network's size (bicubic, antialiased, not re-quantised), never cropped: what lies at
        the border counts too. Raises `UserError` for images of other proportions than the network's.
        """
        self.check_size(*images.shape[2:])
        x = images.float()  # (b, 3, H, W) 0..255
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        return (x / 255 - self.mean) / self.std  # (b, 3, h, w)


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
        self.names = [model.config.id2label[k] for k in range(outputs)]  # of the classes

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 3, H, W) uint8 -> pool (b, D) and logits (b, K)."""
        return self.classify(self.prepare(images))

    def classify(self, prepared: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the network takes, (b, …) -> pool (b, D) and logits (b, K)."""
        pools: list[torch.Tensor] = []
        with self.head.register_forward_pre_hook(lambda _module, args: pools.append(args[0])):
            logits = self.model(**{self.model.main_input_name: prepared}).logits
        expected, found = [(len(prepared), self.head.in_features)], [tuple(pool.shape) for pool in pools]
        if found != expected:
            raise ValueError(f"expected features {expected}, got {found}")
        return pools[0], logits

    def features(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """(N, H, W, 3) uint8 -> pool (N, D), logits (N, K) and labels (N,)."""
        found = super().features(images, batch_size)
        return replace(found, labels=found.logits.argmax(axis=-1))


class ClipExtractor(ClassifierExtractor):
    """A transformers video classifier, such as VideoMAE; its features are the input of its last linear layer.

    It sees as many frames as it was trained on, evenly spread from the first to the last of a clip. The I3D of the Fréchet
    Video Distance is distributed as TorchScript, which is a program that may write files, and is not loaded here: give its
    features as arrays to `metrics.video.compare_clips`.
    """

    protocol = "video"

    def __init__(self, model: torch.nn.Module, sha256: str, *, frames: int, **preparation):
        super().__init__(model, sha256, **preparation)
        self.frames = frames
        self.identity |= {"frames": frames}

    def read(self, clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, F, 3, H, W) uint8 -> pool (b, D) and logits (b, K)."""
        chosen = torch.linspace(0, clips.shape[1] - 1, self.frames).round().long()
        prepared = self.prepare(clips[:, chosen].flatten(0, 1))  # (b·f, 3, h, w)
        return self.classify(prepared.unflatten(0, (len(clips), self.frames)))

    def features(self, images: np.ndarray, batch_size: int = 4) -> Features:
        """(N, F, H, W, 3) uint8 -> pool (N, D), logits (N, K) and labels (N,)."""
        return super().features(images, batch_size)


class Dinov2Extractor(FolderExtractor):
    """DINOv2's CLS token after the last LayerNorm: the features of FD_DINOv2 (Stein et al. 2023; edm2).

    A run that was aligned with DINOv2 may be favoured by it, so it stands beside another extractor, never alone.
    """

    protocol = "dinov2"

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 3, H, W) uint8 -> pool (b, D)."""
        return (self.model(self.prepare(images)).last_hidden_state[:, 0],)


def load_classifier(path: Path, device: torch.device) -> Extractor:
    """Load an image classifier from a transformers folder; raises `UserError` for a folder of anything else."""
    kind, _ = _config(path)
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
    preparation = _preparation(path)
    model, sha256 = _load(transformers.AutoModelForImageClassification, path)
    return ClassifierExtractor(model.to(device), sha256, **preparation)


def load_video_classifier(path: str | Path, device: str | torch.device) -> ClipExtractor:
    """Load a video classifier from a transformers folder; raises `UserError` for a folder of anything else."""
    path = _folder(path)
    kind, config = _config(path)
    if not kind.endswith("ForVideoClassification"):
        raise UserError(
            f"{path} holds {kind!r}; a transformers folder of a video classifier, such as VideoMAEForVideoClassification, was "
            "expected"
        )
    preparation = _preparation(path)
    frames = config.get("num_frames", config.get("frames_per_clip"))
    if not isinstance(frames, int) or not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"{path / 'config.json'} gives no usable num_frames: {frames!r:.40}")
    model, sha256 = _load(transformers.AutoModelForVideoClassification, path)
    return ClipExtractor(model.to(device), sha256, frames=frames, **preparation)


def load_dinov2(path: Path, device: torch.device) -> Extractor:
    """Load DINOv2 from a transformers folder; raises `UserError` for a folder of anything else."""
    kind, config = _config(path)
    if kind not in ("Dinov2Model", "Dinov2WithRegistersModel"):
        raise UserError(f"{path} holds {kind!r}; a transformers folder of a Dinov2Model was expected")
    native = config.get("image_size", DINOV2_SIDE)
    if not isinstance(native, int) or native < 1:
        raise UserError(f"{path / 'config.json'} gives no usable image_size: {native!r}")
    preparation = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": (min(DINOV2_SIDE, native),) * 2}
    if (path / PREPARATION).exists():  # a small model takes what it was trained on
        preparation |= _preparation(path, sized=native < DINOV2_SIDE)
    model, sha256 = _load(transformers.AutoModel, path)
    return Dinov2Extractor(model.to(device), sha256, **preparation)


def _load(loader: type, path: Path) -> tuple[torch.nn.Module, str]:
    """Load the whole model; returns it with the checksum of its weights."""
    model = load_pretrained(loader, str(path), f"extractor {path}", dtype=torch.float32)
    return model, sha256_of(*sorted(path.glob("*.safetensors")))


def _folder(setting: str | Path) -> Path:
    """The folder of a setting; a hub is never asked."""
    if not os.path.isdir(setting):
        raise UserError(f"no feature extractor at {setting}: no such folder (of hub ids give the folder)")
    return Path(setting)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture that the folder's config.json names, or the words that say what is missing, and all that is in it."""
    if not (path / "config.json").exists():
        return "no config.json", {}
    config = read_config(str(path), "config.json", f"extractor {path}")
    match config.get("architectures"):
        case [str(kind), *_]:
            return kind, config
    return "no architecture", config


def _preparation(path: Path, *, sized: bool = True) -> dict[str, Any]:
    """The mean and std of the folder's preprocessor_config.json and, where `sized`, the size (height, width).

    That is the size of the images that the network was trained on: of the crop if there is one, else of the resize.
    """
    found = read_record(path / PREPARATION, Preparation, SAVED)
    statistics = {"mean": found["image_mean"], "std": found["image_std"]}
    if not sized:
        return statistics
    size = found.get("crop_size", found.get("size", {}))
    sides = {"shortest_edge": size} if isinstance(size, int) else size
    height, width = (sides.get(side, sides.get("shortest_edge")) for side in ("height", "width"))
    if height is None or width is None:
        raise UserError(f"{path / PREPARATION} gives no usable size: {size!r}")
    return statistics | {"size": (height, width)}
