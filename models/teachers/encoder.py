"""What every teacher is: a frozen vision encoder that maps images to patch tokens `(B, N, D)`."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.pretrained import PixelStatistics, load_pretrained
from common.sides import Sides, as_kept, height_width

PREPARATION = "preprocessor_config.json"


class TeacherEncoder(nn.Module):
    """A frozen encoder that returns patch tokens row by row, never a CLS token, a register or a pooled token.

        teacher = load_teacher("facebook/dinov2-large", grid=14)   # models/teachers/table.py
        tokens = teacher(images)   # (B, 3, 196, 196) in [0, 1] -> (B, 196, 1024)

    `grid` is the number of tokens per side, or (height, width); the image size follows from it as patch · grid. The tokens are
    the last hidden states after the final LayerNorm, not L2-normalised. `format` says in which format the weights were stored:
    "huggingface" or "facebookresearch". `statistics` are those of the folder's own preprocessor_config.json; None stands for
    the published mean and std. A kind is a subclass that fills in the four class attributes and, where it differs, the methods.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # in a folder's config.json
    mean_and_std: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # published, for pixels in [0, 1]
    views: ClassVar[tuple[str, ...]] = ("aligned",)

    def __init__(
        self,
        model: nn.Module,
        grid: Sides,
        format: str = "huggingface",
        statistics: PixelStatistics | None = None,
    ):
        super().__init__()
        self.format, self.statistics = format, statistics
        self.model = model.eval().requires_grad_(False)
        self.grid = grid
        self.dim = model.config.hidden_size
        self.patch = model.config.patch_size
        self.num_prefix = self.count_prefix(model.config)
        for name, values in zip(("mean", "std"), self.used_mean_and_std, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @classmethod
    def load(cls, config: dict[str, Any], name: str, what: str, revision: str | None) -> nn.Module:
        """Load the model of a folder or hub id, of which `config` is the config.json; raises `UserError`."""
        return load_pretrained(transformers.AutoModel, name, what, revision=revision)

    @staticmethod
    def count_prefix(config: transformers.PretrainedConfig) -> int:
        """Return the number of tokens that come before the patches': CLS and the registers."""
        return 1 + getattr(config, "num_register_tokens", 0)

    @property
    def size(self) -> Sides:
        """The side of the images in pixels, or (height, width)."""
        return as_kept(*(self.patch * side for side in height_width(self.grid)))

    @property
    def used_mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the RGB channels, each 3 numbers."""
        if self.statistics is None:
            return self.mean_and_std
        return tuple(self.statistics["image_mean"]), tuple(self.statistics["image_std"])

    @property
    def normalisation(self) -> dict[str, str]:
        """Mean and std, and where they are from, for the manifest of a cache."""
        mean, std = self.used_mean_and_std
        origin = "published" if self.statistics is None else PREPARATION
        return {"normalisation": f"mean {mean}, std {std}", "normalisation_from": origin}

    @property
    def implementation(self) -> str:
        """Name the library and class that compute the tokens.

        The version is left out, so that a cache can be extended after an upgrade of the library.
        """
        return f"transformers.{type(self.model).__name__}"

    @property
    def resampling(self) -> str:
        """Name the resampling that maps position embeddings from the pretraining grid to this grid."""
        raise NotImplementedError

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """Return the last hidden states `(B, prefix + N, D)` after the final LayerNorm, of normalised pixels."""
        return self.model(pixels).last_hidden_state

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode `images (B, 3, H, W)` in [0, 1] of `size` pixels; returns `(B, N, D)`, row by row."""
        height, width = height_width(self.size)
        if images.shape[1:] != (3, height, width):
            raise ValueError(f"expected images (B, 3, {height}, {width}), got {tuple(images.shape)}")
        hidden = self.hidden_states((images - self.mean) / self.std)  # (B, prefix + N, D)
        return self.check_tokens(hidden[:, self.num_prefix :])  # (B, N, D)

    @torch.no_grad()
    def find_resampling(self, embeddings: nn.Module, positions: Tensor) -> str:
        """Name the resampling by which `embeddings` turn `positions (1, prefix + n, D)` of a square into those of the grid.

        It is found by comparing the two with known resamplings, because classes of transformers differ, and its versions may
        differ too.
        """
        grid = height_width(self.grid)
        side = math.isqrt(positions.shape[1])
        prefix = positions.shape[1] - side**2  # 1 where CLS has a position
        like = positions.new_empty(1, prefix + math.prod(grid), self.dim)
        used = embeddings.interpolate_pos_encoding(like, *height_width(self.size))[:, prefix:]  # (1, N, D)
        native = positions[:, prefix:]  # (1, n, D)
        if used.equal(native):
            return "none (native grid)"
        square = native.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        for antialias in (False, True):
            resized = F.interpolate(square, grid, mode="bicubic", antialias=antialias)
            if used.allclose(resized.flatten(2).mT, atol=1e-5):
                return f"bicubic, antialias={antialias}"
        return "unrecognised"

    def check_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens; raises ValueError unless they are `(B, N, D)`, one for each cell of the grid and more than one.

        With a single token, such as a CLS token, the manifold loss would be 0.
        """
        n, found = math.prod(height_width(self.grid)), tuple(tokens.shape)
        if len(found) != 3 or found[1:] != (n, self.dim) or n == 1:
            raise ValueError(f"the teacher must return (B, {n}, {self.dim}) patch tokens, got {found}")
        return tokens
