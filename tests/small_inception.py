"""Inception's shape in miniature: random weights, the real names and sizes where the protocols look, and images for it."""

import numpy as np
import torch
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from evaluation.image_files import save_images
from metrics.inception import AdmExtractor, CleanExtractor

DIM, CLASSES = 24, 10


class Mixed(nn.Module):
    """A block whose first branch is what sFID reads."""

    def __init__(self, channels, first, second):
        super().__init__()
        self.branch1x1 = nn.Sequential(nn.Conv2d(channels, first, 1), nn.LeakyReLU(0.3))
        self.branch3x3 = nn.Sequential(nn.Conv2d(channels, second, 3, padding=1), nn.LeakyReLU(0.3))

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch3x3(x)], 1)


class SmallInception(FeatureExtractorBase):
    """As torch-fidelity's network: uint8 in, 17 × 17 maps inside, "2048" and "logits_unbiased" out."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.Conv2d_1a = nn.Sequential(nn.Conv2d(3, 16, 17, stride=17), nn.LeakyReLU(0.3))  # 17 x 17
            self.Mixed_6d = Mixed(16, 9, 11)
            self.Mixed_7c = Mixed(20, DIM - 8, 8)
            self.AvgPool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(DIM, CLASSES)
            for parameter in self.parameters():  # livelier than PyTorch's first values
                parameter.data.mul_(2.0)
        self.requires_grad_(False).eval()

    def forward(self, x):
        x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False)
        pool = self.pool(x)
        found = {"2048": pool, "logits_unbiased": pool @ self.fc.weight.T}
        return tuple(found[name] for name in self.features_list)

    def pool(self, x):
        x = (x - 128) / 128
        return self.AvgPool(self.Mixed_7c(self.Mixed_6d(self.Conv2d_1a(x)))).flatten(1)

    @staticmethod
    def get_provided_features_list():
        return "2048", "logits_unbiased"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits_unbiased" if metric == "isc" else "2048"

    @staticmethod
    def can_be_compiled():
        return False


register_feature_extractor("small-inception", SmallInception)


def small_extractors(sha256="f" * 64):
    """The protocols adm and clean over the small network."""
    network = SmallInception("small-inception", ["2048"])
    return AdmExtractor(network, sha256), CleanExtractor(network, sha256)


def pictures(n, seed, *, side=48, tint=(0.0, 0.0, 0.0)):
    """(n, side, side, 3) uint8: smooth random pictures that differ in colour, brightness and pattern."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n, 6, 6, 3)) * rng.uniform(20, 70, size=(n, 1, 1, 1)) + np.asarray(tint)
    coarse += rng.normal(size=(n, 1, 1, 3)) * 40 + 128
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(coarse).permute(0, 3, 1, 2), (side, side), mode="bilinear"
    )
    noisy = smooth.permute(0, 2, 3, 1).numpy() + rng.normal(size=(n, side, side, 3)) * 8
    return noisy.clip(0, 255).astype(np.uint8)


def picture_folder(folder, images):
    """The images as PNG files; returns the path as a string, for libraries that want one."""
    save_images(images, folder, range(len(images)))
    return str(folder)
