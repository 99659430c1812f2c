"""Read an image and cut out the view that an encoder sees.

The VAE sees the central square of the image, resized to `size` px, or the largest central rectangle of the shape of
`size = (height, width)`. In the `aligned` view the teacher sees the same crop, so that its grid of tokens covers the same area
as the grid of latent cells. The `official` view is DINOv2's evaluation transform, which covers only the central 87.5 % of the
square's sides; it exists for comparison with published features.
"""

import errno
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from common.errors import UserError
from common.sides import Sides, height_width

OFFICIAL_RESIZE = 256 / 224  # DINOv2 resizes the shorter side to 256 px and crops the central 224 px
MAX_BYTES = 2**31  # an image that takes more, as a file or in memory, is left out
# The exceptions that PIL raises for a damaged file.
DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
# Maps EXIF's orientation to the operation that turns the image upright. PIL's own `exif_transpose` also rewrites the tags, and
# so fails on damaged tags although the image is fine.
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
    """The file is not a readable image; the message names the file and the reason."""


def read_view(path: str | Path, size: Sides, view: str = "aligned", crop: Sides | None = None) -> np.ndarray:
    """Read an image file and return `cut_view` of it as uint8 RGB `(height, width, 3)`; raises what `read_image` raises."""
    return np.asarray(cut_view(read_image(path), size, view, crop))


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file to upright RGB with 8 bits per channel; transparency is dropped, as in torchvision's loader.

    Raises `UnreadableImage` when the file is empty, truncated, no image or no regular file. Raises `UserError` when the file
    system cannot read it: otherwise an unmounted disk would look like a thousand damaged images.
    """
    with opened_image(path, read_image_file(path)) as image:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        upright = image if turn is None else image.transpose(turn)
        return _eight_bits(upright).convert("RGB")


def read_image_file(path: str | Path) -> bytes:
    """Return the bytes of an image file; raises what `read_image` raises for a file that cannot be read."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # to open a FIFO would wait for its writer
            raise UnreadableImage(f"{path}: not a regular file")
        if about.st_size > MAX_BYTES:
            raise UnreadableImage(f"{path}: {about.st_size:,} bytes, more than {MAX_BYTES:,}")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnreadableImage(f"{path}: a loop of links") from None
        todo = "is the disk still mounted? The same command goes on from here"
        raise UserError(f"cannot read {path}: {error.strerror}; {todo}") from None


@contextmanager
def opened_image(path: str | Path, data: bytes) -> Iterator[Image.Image]:
    """Decode the bytes of an image file, as it is; whatever PIL raises, also in the block, becomes `UnreadableImage`."""
    # The file system is not involved, so an OSError comes from PIL and means damage.
    try:
        with warnings.catch_warnings():
            # Large images and odd metadata are usable, so PIL need not warn of each on the terminal.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(io.BytesIO(data)) as image:  # reads the size alone
                check_memory(*image.size)
                image.load()
                yield image
    except DAMAGE as error:
        # PIL's own message would name the memory buffer instead of the file.
        why = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UnreadableImage(f"{path}: {' '.join(why.split())}") from None


def cut_view(
    image: Image.Image, size: Sides, view: str = "aligned", crop: Sides | None = None
) -> Image.Image:
    """Cut the view of `size` px out of an RGB image; both views resize with antialiased bicubic interpolation.

    `crop` are sides whose shape is cut out, by default those of `size` itself: a grid of patches has seldom the exact shape of
    the VAE's crop. Raises `UnreadableImage` where an image is so narrow that its official view would need more than
    `MAX_BYTES`.
    """
    if view == "aligned":
        box = largest_box(*image.size, size if crop is None else crop)
        return _central(image, *box).resize(height_width(size)[::-1], Image.Resampling.BICUBIC)
    if view == "official":
        side, _ = height_width(size)  # a square's
        shorter = round(side * OFFICIAL_RESIZE)
        # As torchvision does, truncate the longer side and round the position of the crop.
        sides = [shorter * length // min(image.size) for length in image.size]
        try:
            check_memory(*sides)
        except ValueError as error:
            raise UnreadableImage(f"{image.width} × {image.height} pixels, resized: {error}") from None
        return _central(image.resize(sides, Image.Resampling.BICUBIC), side, side)
    raise ValueError(f"view must be one of aligned, official, not {view!r}")


def largest_box(width: int, height: int, shape: Sides) -> tuple[int, int]:
    """Return width and height of the largest box of a shape in an image, rounded to pixels."""
    h, w = height_width(shape)
    if width * h > height * w:
        return max(1, round(height * w / h)), height
    return width, max(1, round(width * h / w))


def size_and_crop(width: int, height: int, size: Sides) -> tuple[int, ...]:
    """Return the six numbers, height first, that Stable Diffusion XL is told of an upright image cut to its aligned view.

    They are the size of the whole image, the place of the crop's top left corner once the image is resized so that one side
    equals the view's and the other is no shorter, and the `size` of the view, in pixels; resized and rounded as diffusers'
    training examples do it for squares.
    """
    h, w = height_width(size)
    resized = (h, h * width // height) if width * h > height * w else (w * height // width, w)
    corner = (round((length - side) / 2) for length, side in zip(resized, (h, w), strict=True))
    return height, width, *corner, h, w


def check_memory(width: int, height: int) -> None:
    """Raise ValueError where an image would need more memory than `MAX_BYTES`; PIL keeps any pixel in 4 bytes at most."""
    if (needed := 4 * width * height) > MAX_BYTES:
        raise ValueError(f"{width} × {height} pixels need {needed:,} bytes, more than {MAX_BYTES:,}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale pixels of 16 bits to 8, because PIL would clip them; return other images unchanged."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)  # (H, W), mode I: int32, I;16: uint16 of either byte order
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have 32 bits; 8 or 16 were expected")
    return Image.fromarray((pixels // 256).astype(np.uint8))


def _central(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (round((all_ - side) / 2) for all_, side in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))
