"""Read an image and cut the view of it that an encoder sees.

The VAE sees the central square, resized to `size`. With the `aligned` view the teacher sees the same square, so that its
token grid lies over the grid of latent cells. The `official` view is DINOv2's evaluation transform, which covers only the
central 87.5 % of the square; it is kept for comparison with published features.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

VIEWS = ("aligned", "official")
OFFICIAL_RESIZE = 256 / 224  # DINOv2: shorter side to 256, then the central 224


class UnreadableImage(ValueError):
    """A file that does not hold a readable image; the message says which and why."""


def read_view(path: str | Path, size: int, view: str = "aligned") -> np.ndarray:
    """Read an image file as uint8 RGB `(size, size, 3)` of the given view.

    Raises `UnreadableImage` for a file that is missing, truncated, or not an image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip instead of scale
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: {' '.join(str(error).split())}") from None
    return np.asarray(cut_view(image, size, view))


def cut_view(image: Image.Image, size: int, view: str = "aligned") -> Image.Image:
    """Cut the view from an RGB image; both views resize with antialiased bicubic interpolation."""
    if view == "aligned":
        return _central(image, min(image.size)).resize((size, size), Image.Resampling.BICUBIC)
    if view == "official":
        shorter = round(size * OFFICIAL_RESIZE)
        # torchvision truncates the longer side and rounds the place of the crop.
        resized = image.resize(
            [shorter * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC
        )
        return _central(resized, size)
    raise ValueError(f"view must be one of {', '.join(VIEWS)}, not {view!r}")


def _central(image: Image.Image, side: int) -> Image.Image:
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))
