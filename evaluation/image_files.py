"""Read and write images: samples as `{index:06d}.png`, each written whole or not at all, and any other folder of images.

A clip is one PNG too, of its frames side by side, so that it is kept without loss and as a whole.

Beside samples stands a log of the checksum of each, so that a picture that something else put there is found.
"""

import io
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cache.films import write_film
from cache.views import UnreadableImage, opened_image, read_image_file
from common.errors import UserError
from common.files import write_atomically
from common.reading import JsonLines, JsonRecord, UnreadableFile, read_bytes
from training.ranks import Ranks

LOG = "images.jsonl"
# A PNG of 512 px takes 74 ms of one core, most of it in zlib, which other threads do not wait for; 64 of them are 50 MB.
WRITERS, WAITING = 4, 64
FILMS = 16  # clips of a folder that stand there as films too, for people
WAITING_BYTES = 2**29  # of long clips fewer wait
PNG_END = b"IEND\xaeB`\x82"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DrawnImage(JsonRecord):
    """A line of images.jsonl: a sample's file name and the CRC-32 of its bytes."""

    name: str
    crc32: int


def image_path(folder: str | Path, index: int) -> Path:
    """The file path of image `index` in a folder of samples."""
    return Path(folder) / f"{index:06d}.png"


def missing_images(folder: str | Path, indices: Sequence[int]) -> list[int]:
    """Those of `indices` that must be drawn: their files are absent or truncated, or the log does not know them.

    Raises `UserError` for a file that is another picture than the one that was drawn.
    """
    drawn = _checksums(folder)
    return [i for i in indices if _read_sample(image_path(folder, i), drawn) is None]


def _log(folder: str | Path) -> JsonLines[DrawnImage]:
    return JsonLines(Path(folder) / LOG, DrawnImage, None)


def _checksums(folder: str | Path) -> Mapping[str, set[int]]:
    """The checksums that each sample may have: two processes that drew it at once may differ in a bit on a GPU."""
    found = defaultdict(set)
    for line in _log(folder).read():
        found[line["name"]].add(line["crc32"])
    return found


def _read_sample(path: Path, drawn: Mapping[str, set[int]]) -> bytes | None:
    """The bytes of a sample; None where it must be drawn. Raises `UserError` as above."""
    try:
        data = read_bytes(path) if path.name in drawn else b""
    except UnreadableFile:
        return None
    if zlib.crc32(data) in drawn.get(path.name, ()):
        return data
    if not data.endswith(PNG_END):
        return None
    raise UserError(f"{path} is not the picture that was drawn there: move it away, and it is drawn again")


class ImageWriter(AbstractContextManager):
    """Writes samples in threads while the next are drawn: each file whole, then its line of the log, in the order of `save`.

    At most `WAITING` images wait: `save` returns when there is room. What a thread raised, the next `save` or the end of the
    `with` raises; the end waits for all that were handed over, also where the block was interrupted, so that none is lost.
    """

    def __init__(self, folder: str | Path):
        self._folder, self._log = folder, _log(folder)
        self._writers, self._noting = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def save(self, images: np.ndarray, indices: Sequence[int]) -> None:
        """Write (N, H, W, 3) uint8 images, or (N, F, H, W, 3) clips, under their indices."""
        if images.ndim == 5:
            images = strips_of(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        waiting = max(WRITERS, min(WAITING, WAITING_BYTES // images[0].nbytes))
        for index, image in zip(indices, images, strict=True):
            self._settle(waiting - 1)
            written = self._writers.submit(_write_png, image_path(self._folder, int(index)), image)
            self._waiting.append(self._noting.submit(self._note, written))

    def _note(self, written: Future[DrawnImage]) -> None:
        self._log.append(written.result())

    def _settle(self, most: int) -> None:
        """Wait until at most so many images wait; raise what a thread raised."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._writers.shutdown()
            self._noting.shutdown()


def _write_png(path: Path, image: np.ndarray) -> DrawnImage:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    data = buffer.getvalue()
    write_atomically(path, data)
    return {"name": path.name, "crc32": zlib.crc32(data)}


def save_images(images: np.ndarray, folder: str | Path, indices: Sequence[int]) -> None:
    """Write (N, H, W, 3) uint8 images under their indices, and wait for them."""
    with ImageWriter(folder) as writer:
        writer.save(images, indices)


def load_images(folder: str | Path, indices: Sequence[int]) -> np.ndarray:
    """The images of these indices, (n, H, W, 3) uint8; raises what `image_chunks` raises."""
    return next(image_chunks(folder, indices, len(indices)))


def image_chunks(folder: str | Path, indices: Sequence[int], size: int) -> Iterator[np.ndarray]:
    """The images of these indices, `size` at a time: 10k images of 512 px are 8 GB.

    Raises `UserError` for missing, foreign or unreadable files and for mixed sizes, so that no metric is taken of fewer images.
    """
    drawn = _checksums(folder)

    def read(part: Sequence[int]) -> list[np.ndarray]:
        found = {path: _read_sample(path, drawn) for path in (image_path(folder, i) for i in part)}
        if missing := [path.name for path, data in found.items() if data is None]:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(found)} images asked for (first: {missing[0]}); "
                "sample them first, or ask for fewer"
            )
        return [_rgb(path, data) for path, data in found.items()]

    yield from _stacked(indices, size, read, folder)


def strips_of(clips: np.ndarray) -> np.ndarray:
    """The frames of each clip (N, F, H, W, 3) side by side: (N, H, F·W, 3)."""
    n, frames, height, width, _ = clips.shape
    return clips.swapaxes(1, 2).reshape(n, height, frames * width, 3)


def clips_of(strips: np.ndarray, frames: int) -> np.ndarray:
    """The clips (N, F, H, W, 3) of `strips_of`."""
    n, height, width, _ = strips.shape
    if width % frames:
        raise ValueError(f"{frames} frames do not stand side by side in {width} px")
    return np.ascontiguousarray(strips.reshape(n, height, frames, -1, 3).swapaxes(1, 2))


def clip_by_clip(folder: str | Path, indices: Sequence[int], frames: int) -> Iterator[np.ndarray]:
    """The clips of these indices, (F, H, W, 3) uint8 one at a time; raises what `image_chunks` raises."""
    return (clips_of(strips, frames)[0] for strips in image_chunks(folder, indices, 1))


def write_films(folder: Path, indices: Sequence[int], frames: int, fps: float) -> None:
    """Write those of the films `{index:06d}.mp4` that are missing beside the first `FILMS` clips of a folder of samples."""
    films = {i: image_path(folder, i).with_suffix(".mp4") for i in indices if i < FILMS}
    lacking = {index: film for index, film in films.items() if not film.exists()}
    clips = clip_by_clip(folder, [*lacking], frames)
    for film, clip in zip(lacking.values(), clips, strict=True):
        write_film(film, clip, fps)


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
    """Images of one size, `size` files at a time, (n, H, W, 3) uint8; raises `UserError` for a file that is none."""
    yield from _stacked(files, size, lambda part: list(map(_read_rgb, part)), files[0].parent)


def _stacked(items: Sequence, size: int, read: Callable, folder: str | Path) -> Iterator[np.ndarray]:
    """What `read` makes of `size` items at a time, (n, H, W, 3); raises `UserError` unless all images have one shape."""
    shapes = set()
    for start in range(0, len(items), size):
        images = read(items[start : start + size])
        shapes |= {image.shape for image in images}
        if len(shapes) > 1:
            raise UserError(f"{folder} mixes image sizes {sorted(shapes)}: all must have one")
        yield np.stack(images)  # (n, H, W, 3)


def _read_rgb(path: Path) -> np.ndarray:
    """An image of one's own."""
    try:
        return _rgb(path, read_image_file(path))
    except UnreadableImage as error:
        raise UserError(f"{error}: take it out of the folder") from None


def _rgb(path: Path, data: bytes) -> np.ndarray:
    """(H, W, 3) uint8; raises `UnreadableImage`."""
    with opened_image(path, data) as image:
        if image.mode != "RGB":
            raise ValueError(f"a {image.mode} image, RGB is wanted")
        return np.asarray(image)
