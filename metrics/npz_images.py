"""Images in ADM's file format: an .npz with `arr_0`, (N, H, W, 3) uint8.

Read and written as a stream: 50k images of 512 px are 39 GB.
"""

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError, one_line
from common.files import file_written_whole
from common.reading import open_regular

MEMBER = "arr_0.npy"
# What zipfile and numpy raise for a damaged, an encrypted or an unusually compressed file, or for a header that is a bomb.
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, MemoryError)
DAMAGE += (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def npz_image_shape(path: str | Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of the images in a file, without reading them."""
    with _opened(Path(path)) as (_, shape):
        return shape


def iterate_npz_images(path: str | Path, chunk: int = 500) -> Iterator[np.ndarray]:
    """Images in order, as (n, H, W, 3) uint8 with n <= chunk, n * H * W * 3 bytes in memory.

    A damaged or foreign file is a `UserError`; since its checksum covers the whole, some damage shows only at the end.
    """
    with _opened(Path(path)) as (file, (count, *shape)):
        for start in range(0, count, chunk):
            size = (min(chunk, count - start), *shape)
            data = file.read(math.prod(size))
            if len(data) < math.prod(size):
                found = start + len(data) // math.prod(shape)
                raise UserError(f"{path} ends after {found} of {count} images")
            yield np.frombuffer(data, np.uint8).reshape(size)  # (n, H, W, 3)
        if file.read(1):  # and so the checksum is compared
            raise UserError(f"{path} holds more than the {count} images it announces")


def write_npz_images(
    path: str | Path, chunks: Iterable[np.ndarray], count: int, shape: tuple[int, int]
) -> None:
    """Write `count` images of `shape` (H, W), which arrive as (n, H, W, 3) uint8, as one file that `np.load` reads.

    The file is whole or absent. It is not compressed, as ADM's are not.
    """
    height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
    written = 0
    with (
        file_written_whole(path) as target,
        zipfile.ZipFile(target, "w") as archive,
        archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for images in chunks:
            if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
                raise ValueError(f"images must be (n, {height}, {width}, 3) uint8, got {images.shape}")
            file.write(np.ascontiguousarray(images).data)
            written += len(images)
        if written != count:
            raise ValueError(f"{count} images were announced and {written} came")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, int, int, int]]]:
    """The member `arr_0` behind its header, and its shape."""
    try:
        with open_regular(path) as raw, zipfile.ZipFile(raw) as archive:
            if MEMBER not in archive.namelist():
                raise UserError(f"{path} has no arr_0: a file of images has one, (N, H, W, 3) uint8")
            with archive.open(MEMBER) as file:
                shape = _read_header(file, path)
                if math.prod(shape) > archive.getinfo(MEMBER).file_size:
                    raise UserError(f"{path} is damaged: too small for the {shape[0]} images it announces")
                yield file, shape
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read as an .npz of images: {one_line(error)}") from None


def _read_header(file: BinaryIO, path: Path) -> tuple[int, int, int, int]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UserError(f"{path}: arr_0 is of numpy's format {version}, 1.0 or 2.0 was expected")
    shape, fortran_order, dtype = readers[version](file)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order or min(shape) < 1:
        raise UserError(f"{path}: arr_0 must be (N, H, W, 3) uint8 in C order, it is {shape} {dtype}")
    return shape
