"""Inception v3 as the ADM suite and clean-fid see it: one network, two ways to bring an image to 299 × 299.

The network and its weights are those of TensorFlow's classify_image_graph_def of 2015, as torch-fidelity converted them.

- `adm` (Dhariwal & Nichol 2021, evaluations/evaluator.py): TensorFlow 1's bilinear resize without antialiasing; `pool_3` for
  FID, logits without their bias for the Inception Score, the first 7 channels of `mixed_6/conv` for sFID, flattened from NHWC.
- `clean` (Parmar et al. 2022): PIL's antialiased bicubic resize in floats, not rounded to bytes; `pool_3` alone.
"""

import io
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.pretrained import reason_of
from metrics.features import Extractor, sha256_of

SIDE = 299  # pixels
HASH = "6726825d"  # how the sha256 of the weights begins; the file's name says so, by torch.hub's convention
FILES = (f"weights-inception-2015-12-05-{HASH}.pth", f"pt_inception-2015-12-05-{HASH}.pth")
SPATIAL_CHANNELS = 7  # of 192: 17 · 17 · 7 = 2023, near the 2048 of the pool


class InceptionExtractor(Extractor):
    """What both protocols share: the network's layers in order, the layer that sFID reads, and the classifier's weights."""

    resize: str  # how images are brought to 299 × 299

    def __init__(self, network: nn.Module, weights_sha256: str):
        """`network` is torch-fidelity's, or one with its names: children in order of use, the last of them `fc`."""
        super().__init__(network, weights_sha256, resize=self.resize)
        self.layers = nn.Sequential(*list(network.children())[:-1])
        self.spatial = network.Mixed_6d.branch1x1
        self.classifier = network.fc.weight  # (K, D)

    def pool(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, 299, 299) in 0..255 -> (b, D)."""
        return self.layers((images - 128) / 128).flatten(1)


class AdmExtractor(InceptionExtractor):
    """Features by the definitions of ADM's evaluator: FID, sFID, IS, precision and recall."""

    protocol, resize = "adm", f"TensorFlow 1 bilinear to {SIDE}"

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 3, H, W) uint8 -> pool (b, 2048), logits without bias (b, 1008), spatial (b, 2023)."""
        maps: list[torch.Tensor] = []
        with self.spatial.register_forward_hook(lambda _module, _args, output: maps.append(output)):
            pool = self.pool(resize_adm(images))  # (b, D)
        spatial = maps[0][:, :SPATIAL_CHANNELS]  # (b, 7, 17, 17)
        # ADM's arrays are NHWC: the same numbers in another order would be another distribution.
        return pool, pool @ self.classifier.T, spatial.permute(0, 2, 3, 1).flatten(1)


class CleanExtractor(InceptionExtractor):
    """Features by clean-fid's protocol, mode "clean"."""

    protocol, resize = "clean", f"bicubic antialiased to {SIDE} in float64"

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 3, H, W) uint8 -> pool (b, 2048)."""
        return (self.pool(resize_clean(images)),)


def resize_adm(images: torch.Tensor) -> torch.Tensor:
    """(b, 3, H, W) uint8 -> (b, 3, 299, 299) float32 in 0..255, as TensorFlow 1: no half-pixel centres, no antialiasing."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)


def resize_clean(images: torch.Tensor) -> torch.Tensor:
    """(b, 3, H, W) uint8 -> (b, 3, 299, 299) float32 in 0..255, as PIL resizes floats.

    float64 because PIL computes in double: within 1.5e-5 of it then, and only within 3e-3 in float32.
    """
    resized = F.interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).float()


def find_weights(setting: str | Path) -> Path:
    """The weights' file: the one that is named, or for "inception" the first in torch.hub's folder."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [folder / name for name in FILES] if str(setting) == "inception" else [Path(setting)]
    for place in places:
        if place.is_file():
            return place
    missing = f"Inception's weights are missing: put {URL_INCEPTION_V3} at {places[0]}"
    raise UserError(f"{missing}; nothing is downloaded here")


def load_inception(path: Path, device: torch.device, *, sha256: str = HASH) -> list[Extractor]:
    """The protocols `adm` and `clean` over one network, from weights whose checksum begins with `sha256`.

    Nothing is unpickled: torch-fidelity's constructor would, so it is handed a copy of tensors that were read safely before.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    found = sha256_of(path)
    if not found.startswith(sha256):
        why = f"its sha256 begins {found[:8]}, not {sha256}"
        raise UserError(f"{path} is not Inception's weights ({why}): replace it by {URL_INCEPTION_V3}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copy)
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded as Inception's weights: {reason_of(error)}") from None
    network = network.to(device)
    return [AdmExtractor(network, found), CleanExtractor(network, found)]
