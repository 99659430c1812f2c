"""The teacher: a frozen DINOv2 that maps images to patch tokens `(B, N, D)`."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.errors import UserError
from common.pretrained import load_pretrained, read_config
from common.sides import Sides, as_kept, height_width
from models.teachers.dinov2_checkpoint import load_checkpoint

# The pixel statistics DINOv2 was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODEL_TYPES = ("dinov2", "dinov2_with_registers")


class DINOv2Encoder(nn.Module):
    """A frozen DINOv2 that returns patch tokens, never the CLS token.

        teacher = DINOv2Encoder.from_pretrained("facebook/dinov2-large", grid=14)  # or "dinov2_vitl14_pretrain.pth"
        tokens = teacher(images)   # (B, 3, 196, 196) in [0, 1] -> (B, 196, 1024)

    `grid` is the number of tokens per side, or (height, width); the image size follows from it as patch · grid. The tokens are
    the last hidden states after the final LayerNorm (`x_norm_patchtokens` in the original code), not L2-normalised. `format`
    says in which format the weights were stored: "huggingface" or "facebookresearch".
    """

    def __init__(self, model: nn.Module, grid: Sides, format: str = "huggingface"):
        super().__init__()
        self.format = format
        self.model = model.eval().requires_grad_(False)
        self.grid = grid
        self.dim = model.config.hidden_size
        self.size = as_kept(*(model.config.patch_size * side for side in height_width(grid)))
        # The CLS token and the registers come before the patch tokens.
        self.num_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_pretrained(cls, name: str, grid: Sides, revision: str | None = None) -> "DINOv2Encoder":
        """Load a DINOv2 from a Hugging Face folder or hub id, or from a file in the format of the original repository.

        Raises `UserError` for anything else. A hub id looks like `facebook/dinov2-large`.
        """
        file, what = Path(name), f"teacher {name}"
        if file.is_file():
            if revision is not None:
                raise UserError(f"{what} is a file and has no revision: leave out the revision")
            return cls(load_checkpoint(file), grid, format="facebookresearch")
        config = read_config(name, "config.json", what, revision=revision)
        if (found := config.get("model_type")) not in MODEL_TYPES:
            raise UserError(f"{what} is a {found} model; DINOv2 was expected")
        model = load_pretrained(transformers.AutoModel, name, what, revision=revision).float()
        if not isinstance(patch := model.config.patch_size, int) or patch < 1:
            raise UserError(
                f"{what} has patch_size = {patch!r}; a number of pixels was expected: mend its config"
            )
        return cls(model, grid)

    @property
    def implementation(self) -> str:
        """Name the library and class that compute the tokens.

        The version is left out, so that a cache can be extended after an upgrade of the library.
        """
        return f"transformers.{type(self.model).__name__}"

    @property
    @torch.no_grad()
    def resampling(self) -> str:
        """Name the resampling that maps position embeddings from the pretraining grid to this grid.

        It is found by comparing the model's output with known resamplings, because `Dinov2Model` and `Dinov2WithRegistersModel`
        differ, and versions of transformers may differ too.
        """
        positions = self.model.embeddings.position_embeddings  # (1, 1 + n, D)
        grid, size = height_width(self.grid), height_width(self.size)
        like = positions.new_empty(1, 1 + math.prod(grid), self.dim)
        used = self.model.embeddings.interpolate_pos_encoding(like, *size)  # (1, 1 + N, D)
        if used.equal(positions):
            return "none (native grid)"
        side = math.isqrt(positions.shape[1] - 1)
        native = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        for antialias in (False, True):
            resized = F.interpolate(native, grid, mode="bicubic", antialias=antialias)
            if used[:, 1:].allclose(resized.flatten(2).mT, atol=1e-5):
                return f"bicubic, antialias={antialias}"
        return "unrecognised"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode `images (B, 3, H, W)` in [0, 1] of `size` pixels; returns `(B, N, D)`, row by row."""
        height, width = height_width(self.size)
        if images.shape[1:] != (3, height, width):
            raise ValueError(f"expected images (B, 3, {height}, {width}), got {tuple(images.shape)}")
        hidden = self.model((images - self.mean) / self.std).last_hidden_state  # (B, prefix + N, D)
        return self.check_tokens(hidden[:, self.num_prefix :])  # (B, N, D)

    def check_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens; raises ValueError unless they are `(B, N, D)`, one for each cell of the grid and more than one.

        With a single token, such as a CLS token, the manifold loss would be 0.
        """
        n, found = math.prod(height_width(self.grid)), tuple(tokens.shape)
        if len(found) != 3 or found[1:] != (n, self.dim) or n == 1:
            raise ValueError(f"the teacher must return (B, {n}, {self.dim}) patch tokens, got {found}")
        return tokens
