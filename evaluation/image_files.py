"""Read and write images: samples as `{index:06d}.png`, each written whole or not at all, and any other folder of images."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomically
from training.ranks import Ranks

PNG_END = b"IEND\xaeB`\x82"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_path(folder: str | Path, index: int) -> Path:
    """The file path of image `index` in a folder of samples."""
    return Path(folder) / f"{index:06d}.png"


def missing_images(folder: str | Path, indices: Sequence[int]) -> list[int]:
    """Those of `indices` whose files are absent or truncated."""
    return [i for i in indices if not _is_whole(image_path(folder, i))]


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), io.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # none, or too short
        return False


def save_images(images: np.ndarray, folder: str | Path, indices: Sequence[int]) -> None:
    """Write (N, H, W, 3) uint8 images under their indices, each atomically."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    for index, image in zip(indices, images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomically(image_path(folder, int(index)), buffer.getvalue())


def load_images(folder: str | Path, indices: Sequence[int]) -> np.ndarray:
    """The images of these indices, (n, H, W, 3) uint8.

    Raises `UserError` for missing or unreadable files and for mixed sizes, so that no metric is taken of fewer images.
    """
    if missing := missing_images(folder, indices):
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(indices)} images asked for (first: "
            f"{image_path(folder, missing[0]).name}); sample them first, or ask for fewer"
        )
    return _stacked([_read_rgb(image_path(folder, i)) for i in indices], folder)


def image_chunks(folder: str | Path, indices: Sequence[int], size: int) -> Iterator[np.ndarray]:
    """The images of these indices, `size` at a time: 10k images of 512 px are 8 GB."""
    for start in range(0, len(indices), size):
        yield load_images(folder, indices[start : start + size])


def watched(
    chunks: Iterable[Sequence], ranks: Ranks, what: str, total: int, done: int = 0
) -> Iterator[Sequence]:
    """Yield chunks of this process's images under a bar that counts those of all processes together."""
    bar = tqdm(desc=what, initial=done, total=total, unit="image", leave=False, disable=not ranks.main)
    with bar:
        for chunk in chunks:
            yield chunk
            bar.update(min(ranks.world * len(chunk), bar.total - bar.n))


def image_files(folder: Path) -> list[Path]:
    """All pictures in a folder and its subfolders, by name; raises `UserError` where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{folder} is no folder of images ({', '.join(PICTURES)})")
    return found


def files_in_chunks(files: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    """Images of one size, `size` files at a time, (n, H, W, 3) uint8."""
    shape = None
    for start in range(0, len(files), size):
        images = _stacked([_read_rgb(path) for path in files[start : start + size]], files[start].parent)
        if shape not in (None, images.shape[1:]):
            raise UserError(
                f"{files[start].parent} mixes image sizes {shape} and {images.shape[1:]}: give one size"
            )
        shape = images.shape[1:]
        yield images


def _stacked(images: list[np.ndarray], folder: str | Path) -> np.ndarray:
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise UserError(f"{folder} mixes image sizes {sorted(sizes)}: all must have one")
    return np.stack(images)  # (n, H, W, 3)


def _read_rgb(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise UserError(f"{path} is a {image.mode} image, RGB is wanted")
            return np.asarray(image)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); delete it (a sample is drawn again)"
        ) from None
