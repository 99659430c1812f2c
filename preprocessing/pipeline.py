"""Turn a list of images or clips into cached fields.

Worker processes decode the images, the device encodes them in batches, and a thread writes the values. Scripts 2 and 3 differ
only in the `FieldJob` that they pass to `encode_fields`. Given two jobs, it decodes every image once.
"""

import os
import shutil
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cache.clips import clip_frames
from cache.image_list import Sample, clip_shape, read_samples
from cache.manifest import UNREADABLE, FieldSpec, crop_of
from cache.shard_plan import shard_path
from cache.shards import FieldWriter
from cache.views import UnreadableImage, cut_view, read_image, size_and_crop
from common.errors import UserError
from common.sides import height_width
from common.signals import StopSignal, leave_signals_to_the_parent

# At most so many encoded batches wait to be written; that is enough to keep the device from waiting for the disk.
IN_FLIGHT = 3


@dataclass(frozen=True, eq=False)
class FieldJob:
    """One field to make. `spec.view` names the crop of the image that the encoder sees.

    `encode` maps uint8 pixels `(n, 3, height, width)`, of clips `(n, F, 3, height, width)`, and their ids to values
    `(n, *spec.shape)` on `device`.
    """

    folder: Path
    spec: FieldSpec
    encode: Callable[[Tensor, Sequence[str]], Tensor]
    device: torch.device

    @property
    def view(self) -> tuple[tuple[int, int], str, tuple[int, int]]:
        """The further arguments of `cut_view`."""
        return height_width(self.spec.view["size"]), self.spec.view["kind"], crop_of(self.spec.view)


# The ids of images that are decoded, encoded and written together, and the (job, shard number) of each field that needs them.
Chunk = tuple[tuple[str, ...], list[tuple[FieldJob, int]]]


def encode_fields(
    samples: list[Sample],
    jobs: Sequence[FieldJob],
    *,
    batch_size: int,
    workers: int,
    part: tuple[int, int] = (0, 1),
    shard_size: int | None = None,
) -> None:
    """Encode every item of the list for every job and store the values by id. A second call resumes an interrupted one.

    Unreadable images are left out and listed in `unreadable.csv`. After Ctrl-C or SIGTERM, the batches that are already encoded
    are still written before the process ends with exit code 130. `part = (i, n)` writes only every n-th shard, starting at i.
    """
    ids = [sample.id for sample in samples]
    noun = "images" if clip_shape(samples) is None else "clips"
    writers = {job: FieldWriter(job.folder, job.spec, ids, shard_size=shard_size, part=part) for job in jobs}
    try:
        chunks = _chunks(writers, batch_size)
        check_disk(writers.values(), noun)
        if chunks and _encode_chunks(chunks, writers, samples, workers, part):
            raise KeyboardInterrupt
        for writer in writers.values():
            report(writer, writer.finish(), part, noun)
    finally:
        for writer in writers.values():
            writer.close()


def _chunks(writers: dict[FieldJob, FieldWriter], batch_size: int) -> list[Chunk]:
    """Return the batches that are left to do. Where two fields lack the same ids, one chunk serves both."""
    jobs = defaultdict(list)
    for job, writer in writers.items():
        for shard, ids in writer.pending(batch_size):
            jobs[tuple(ids)].append((job, shard))
    # Chunks are sorted by shard, so that shards are completed one after the other even if one field is ahead.
    place = {key: n for n, key in enumerate(chain.from_iterable(next(iter(writers.values())).plan))}
    return sorted(jobs.items(), key=lambda chunk: place[chunk[0][0]])


def _encode_chunks(chunks: list[Chunk], writers, samples: list[Sample], workers: int, part) -> bool:
    """Encode and store all chunks; return whether a signal stopped this early."""
    listed = {sample.id: sample for sample in samples}
    mine = {key for writer in writers.values() for number in writer.mine for key in writer.plan[number]}
    left = sum(len(ids) for ids, _ in chunks)
    total = max(len(mine), left)  # larger when two fields lack different ids: images are then read twice
    on_gpu = any(job.device.type == "cuda" for job in writers)
    wanted = [(ids, list(dict.fromkeys(job.view for job, _ in jobs))) for ids, jobs in chunks]
    loader = DataLoader(
        wanted, batch_size=None, collate_fn=partial(_decode, listed), num_workers=workers, pin_memory=on_gpu,
        worker_init_fn=leave_signals_to_the_parent, prefetch_factor=2 if workers else None,
        # Forked workers end when this process is killed; those of a fork server would go on running.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )  # fmt: skip
    name = " and ".join(job.spec.field for job in writers)
    bar = tqdm(
        total=total, initial=total - left, unit="clip" if clip_shape(samples) else "img", smoothing=0.05,
        desc=name if part[1] == 1 else f"{name} {part[0]}/{part[1]}",
        disable=os.environ.get("LOCAL_RANK", "0") != "0",  # under torchrun, one process per machine shows a bar
    )  # fmt: skip
    in_flight: deque[Future] = deque()
    # One thread does all the writing, so that the device encodes the next batch while the last one is written.
    with failures_explained(), bar, StopSignal() as stop, ThreadPoolExecutor(1) as disk:
        for (ids, jobs), decoded in zip(chunks, loader, strict=True):
            if isinstance(decoded, UserError):
                raise decoded
            kept, views, crops, unreadable = decoded
            stored = [
                (writers[job], shard, kept, *_encode(job, views[job.view], crops[job.view], kept), unreadable)
                for job, shard in jobs
            ]
            in_flight.append(disk.submit(_store, stored))
            while len(in_flight) > IN_FLIGHT or (in_flight and in_flight[0].done()):
                in_flight.popleft().result()
            bar.update(len(ids))
            if stop.requested:
                break
        for future in in_flight:
            future.result()
    return stop.requested


@contextmanager
def failures_explained() -> Iterator[None]:
    """Explain the errors that a lack of memory causes. It wraps the whole loop, since any line may report a worker's death."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "a batch does not fit into the GPU's memory: lower --batch-size; the same command goes on from here"
        ) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        with suppress(RuntimeError):
            # The closed connection is noticed first; torch's signal handler raises once more during this sleep.
            time.sleep(0.5)
        raise UserError(
            "a decoding process died, for want of memory or of shared memory (docker: --shm-size=8g): lower --workers or "
            "--batch-size; the same command goes on from here"
        ) from None


def _encode(
    job: FieldJob, pixels: Tensor, crops: Tensor, ids: Sequence[str]
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Encode a batch and start copying the bytes to store to host memory.

    Returns the bytes, uint8 `(n, value_bytes)`, and the CUDA event after which they are complete, or None if they already are.
    """
    if not ids:
        return torch.empty(0, job.spec.value_bytes, dtype=torch.uint8), None
    raw = job.spec.encode(job.encode(pixels, ids), crops)  # (n, value_bytes)
    if raw.device.type != "cuda":
        return raw.cpu(), None
    host = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=True).copy_(raw, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _store(stored) -> None:
    for writer, shard, ids, raw, arrived, unreadable in stored:
        if arrived is not None:
            arrived.synchronize()
        writer.put(shard, ids, raw, unreadable)


def _decode(listed: dict[str, Sample], chunk: tuple[Sequence[str], list[tuple]]):
    """Decode the images or clips of a chunk, `(ids, views)`, in a worker process of the DataLoader.

    Returns the ids of the readable ones, {view: uint8 `(n, [F,] 3, H, W)`}, {view: int32 `(n, 6)`} of `size_and_crop`, and
    {id: problem} of the others. A `UserError` is returned instead of raised, because a DataLoader would bury it in the
    traceback of its worker.
    """
    ids, wanted = chunk
    kept, unreadable = [], {}
    frames = listed[ids[0]].frames
    many = () if frames is None else (frames,)
    views = {view: torch.empty(len(ids), *many, *view[0], 3, dtype=torch.uint8) for view in wanted}
    crops = {view: torch.empty(len(ids), 6, dtype=torch.int32) for view in wanted}
    for key in ids:
        rows = {view: pixels.numpy()[len(kept)] for view, pixels in views.items()}  # ([F,] H, W, 3)
        try:
            size = read_cuts(listed[key], rows)
        except UnreadableImage as error:
            unreadable[key] = str(error)
            continue
        except UserError as error:
            return error
        for view, rows in crops.items():
            rows[len(kept)] = torch.tensor(size_and_crop(*size, view[0]))
        kept.append(key)
    views = {view: pixels[: len(kept)].movedim(-1, -3) for view, pixels in views.items()}
    return kept, views, {view: rows[: len(kept)] for view, rows in crops.items()}, unreadable


def read_cuts(sample: Sample, rows: dict[tuple, np.ndarray]) -> tuple[int, int]:
    """Fill in the pixels of every view, of an image `(H, W, 3)` or of a clip `(F, H, W, 3)`, which is read frame by frame.

    Returns width and height of the whole picture. Raises `UnreadableImage` or `UserError`; some rows may be filled in by then.
    """
    if sample.frames is None:
        image = read_image(sample.img_path)
        for view, row in rows.items():
            row[:] = cut_view(image, *view)
        return image.size
    frames = clip_frames(sample.img_path, sample.start, sample.frames, sample.fps)
    for number, frame in enumerate(frames):
        for view, row in rows.items():
            row[number] = cut_view(frame, *view)
    return frame.size


def read_images_to_encode(path: Path) -> list[Sample]:
    """Return the items of the CSV; raises `UserError` when an image is absent. Folders are listed, not files looked at."""
    samples = read_samples(path)

    @cache
    def names_in(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def is_absent(path: str) -> bool:
        folder, name = os.path.split(path)
        return name not in names_in(folder or ".")

    absent = [sample.img_path for sample in samples if is_absent(sample.img_path)]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(samples)} images of {path} do not exist, the first is {absent[0]}: restore them, run "
            "from the folder where script 1 ran, or make a new list with script 1"
        )
    return samples


def check_disk(writers: Iterable[FieldWriter], what: str) -> None:
    """Print how much will be written; raises `UserError` when a disk has too little space for it."""
    needed: dict[int, int] = {}
    for writer in writers:
        device, free = os.stat(writer.folder).st_dev, shutil.disk_usage(writer.folder).free
        needed[device] = needed.get(device, 0) + writer.bytes_to_write
        if writer.complete:
            continue
        print(
            f"{writer.folder}: {writer.spec.form} for {sum(map(len, writer.plan)):,} {what} in "
            f"{len(writer.plan)} shards; {_size(writer.bytes_to_write)} to write, {_size(free)} free"
        )
        if needed[device] > free:
            raise UserError(
                f"{writer.folder} needs {_size(needed[device])} and the disk has {_size(free)}: free some, move --out, or "
                "store less with --dtype"
            )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def report(writer: FieldWriter, manifest: dict | None, part: tuple[int, int], noun: str = "images") -> None:
    """Print how far a field is, from what `FieldWriter.finish` returned; raises `UserError` where no image could be read."""
    folder, shards = writer.folder, len(writer.plan)
    if not writer.mine:
        print(f"{folder}: none of its {shards} shards falls to part {part[0]} of {part[1]}")
        return
    if manifest is None:
        done = sum(shard_path(folder, n).exists() for n in range(shards))
        print(f"{folder}: part {part[0]} of {part[1]} is done, {done} of {shards} shards are there")
        return
    stored, lacking, listed = manifest["num_samples"], manifest["num_unreadable"], folder / UNREADABLE
    if not stored:
        raise UserError(f"not one of {lacking} {noun} could be read: see {listed}, then delete it all")
    if lacking:
        print(f"{lacking:,} {noun} could not be read and are left out: {listed}", file=sys.stderr)
    print(f"{folder} is complete: {stored:,} {writer.spec.field} {writer.spec.form}")
