"""Read an image and cut the view of it that an encoder sees.

The VAE sees the central square, resized to `size`. With the `aligned` view the teacher sees the same square, so that its
token grid lies over the grid of latent cells. The `official` view is DINOv2's evaluation transform, which covers only the
central 87.5 % of the square; it is kept for comparison with published features.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from common.errors import UserError

VIEWS = ("aligned", "official")
OFFICIAL_RESIZE = 256 / 224  # DINOv2: shorter side to 256, then the central 224
# What PIL raises for a damaged file.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# EXIF's orientation and the turn that undoes it. PIL's own `exif_transpose` also writes the tags anew and fails at damaged
# ones, although the image is fine.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A file that does not hold a readable image; the message says which and why."""


def read_view(path: str | Path, size: int, view: str = "aligned") -> np.ndarray:
    """Read an image file as uint8 RGB `(size, size, 3)` of the given view; raises what `read_image` raises."""
    return np.asarray(cut_view(read_image(path), size, view))


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file to RGB, 8 bits a channel, upright; transparency is dropped, as torchvision's loader does.

    Raises `UnreadableImage` for a file that is empty, truncated or not an image, and `UserError` when the file system does
    not give the file: an unmounted disk must not pass for a thousand damaged images.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; is the disk still mounted? The same command goes on from here"
        ) from None
    # From here on the file system has no part, so an OSError is PIL's word for damage.
    try:
        with warnings.catch_warnings():
            # Large images and odd metadata are usable; PIL would tell of each on the terminal.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _eight_bits(_upright(image)).convert("RGB")
    except DAMAGE as error:
        # PIL names the buffer where it would name the file.
        why = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UnreadableImage(f"{path}: {' '.join(why.split())}") from None


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


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation asks."""
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits a pixel to 8, which PIL would clip; other images as they are."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)  # (H, W), mode I: int32, I;16: uint16 of either byte order
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have 32 bits; 8 or 16 were expected")
    return Image.fromarray((pixels // 256).astype(np.uint8))


def _central(image: Image.Image, side: int) -> Image.Image:
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))
