"""From a list of images to one cached field: decode in workers, encode in batches, write durable shards.

Scripts 2 and 3 differ only in the encoder they hand to `encode_field`.
"""

import csv
import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from errors import UserError
from files import write_atomically
from preprocessing.images import UnreadableImage, read_view
from preprocessing.manifest import FieldSpec
from preprocessing.samples import Sample, read_samples
from preprocessing.shards import FieldWriter

UNREADABLE = "unreadable.csv"


class _ViewDataset(Dataset):
    """Item = one durable batch: shard number, ids of the readable images, their uint8 views `(n, 3, S, S)`."""

    def __init__(self, batches, paths: dict[str, str], size: int, view: str):
        self.batches, self.paths, self.size, self.view = batches, paths, size, view

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        shard, ids = self.batches[index]
        kept, views = [], []
        for key in ids:
            try:
                views.append(read_view(self.paths[key], self.size, self.view))
                kept.append(key)
            except UnreadableImage:
                continue  # told of at the end
        pixels = np.stack(views) if views else np.empty((0, self.size, self.size, 3), np.uint8)
        return shard, kept, torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (n, 3, S, S)


def encode_field(
    samples: list[Sample],
    folder: Path,
    spec: FieldSpec,
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    size: int,
    view: str,
    batch_size: int,
    workers: int,
) -> None:
    """Encode every sample and store it under its id; a second call goes on where the first stopped.

    `encode` maps uint8 pixels `(n, 3, size, size)` to values `(n, *spec.shape)`. Unreadable images are left out, listed in
    `unreadable.csv`, and counted on the terminal.
    """
    writer = FieldWriter(folder, spec, [sample.id for sample in samples])
    batches = writer.pending(batch_size)
    if writer.complete:
        print(f"{folder} is already complete")
        return
    left = sum(len(ids) for _, ids in batches)
    _check_disk(folder, left * spec.value_bytes, f"{left} {spec.field}")
    dataset = _ViewDataset(batches, {sample.id: sample.img_path for sample in samples}, size, view)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    try:
        with tqdm(total=len(samples), initial=len(samples) - left, unit="img", desc=spec.field) as bar:
            for (shard, asked), (_, kept, pixels) in zip(batches, loader, strict=True):
                if kept:
                    values = encode(pixels).cpu().numpy().astype(spec.dtype)  # (n, *shape)
                    writer.put(shard, kept, values)
                bar.update(len(asked))
        left_out = writer.missing()
        problems = [
            (sample.id, _problem(sample.img_path, size, view)) for sample in samples if sample.id in left_out
        ]
        if len(problems) == len(samples):
            raise UserError(f"not one of {len(samples)} images could be read, the first: {problems[0][1]}")
        if problems:  # before the manifest, so that a finished field always says what it lacks
            _write_problems(folder / UNREADABLE, problems)
        manifest = writer.finish()
    finally:
        writer.close()
    if problems:
        print(
            f"{len(problems)} images could not be read and are left out: {folder / UNREADABLE}",
            file=sys.stderr,
        )
    print(f"{folder}: {manifest['num_samples']} {spec.field} of shape {spec.shape} {spec.dtype}")


def read_images_to_encode(path: Path) -> list[Sample]:
    """The CSV's samples, after a look whether its images are there at all."""
    samples = read_samples(path)
    if not Path(samples[0].img_path).exists():
        raise UserError(
            f"{samples[0].img_path} (first image of {path}) does not exist; run from the folder where script 1 ran, "
            "or run script 1 again"
        )
    return samples


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over names and bytes of all weights: the model's identity, however it was stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_disk(folder: Path, payload: int, what: str) -> None:
    """Say how much will be written and refuse when the disk cannot hold it."""
    # LMDB's pages cost up to 13 % beside the values.
    needed, free = int(payload * 1.13), shutil.disk_usage(folder).free
    print(f"{folder}: {what} to write, {needed / 1e9:.2f} GB; {free / 1e9:.1f} GB free")
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: free some or move --out"
        )


def _problem(path: str, size: int, view: str) -> str:
    """Why an image was left out."""
    try:
        read_view(path, size, view)
    except UnreadableImage as error:
        return str(error)
    return f"{path}: could not be read at first, but can be now"


def _write_problems(path: Path, problems: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("id", "problem"), *problems])
    write_atomically(path, text.getvalue().encode())
