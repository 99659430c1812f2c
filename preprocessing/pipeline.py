"""From a list of images to one cached field: decode in workers, encode in batches, write durable shards.

Scripts 2 and 3 differ only in the encoder they hand to `encode_field`.
"""

import csv
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from errors import UserError
from preprocessing.images import UnreadableImage, read_view
from preprocessing.manifest import FieldSpec
from preprocessing.samples import Sample, read_samples
from preprocessing.shards import FieldWriter

UNREADABLE = "unreadable.csv"


class _ViewDataset(Dataset):
    """Item = one durable batch: shard number, ids, uint8 views `(n, 3, S, S)`, and the images that could not be read."""

    def __init__(self, batches, paths: dict[str, str], size: int, view: str):
        self.batches, self.paths, self.size, self.view = batches, paths, size, view

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        shard, ids = self.batches[index]
        kept, views, unreadable = [], [], []
        for key in ids:
            try:
                views.append(read_view(self.paths[key], self.size, self.view))
                kept.append(key)
            except UnreadableImage as error:
                unreadable.append((key, str(error)))
        pixels = np.stack(views) if views else np.empty((0, self.size, self.size, 3), np.uint8)
        return shard, kept, torch.from_numpy(pixels).permute(0, 3, 1, 2), unreadable  # (n, 3, S, S)


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
    unreadable = []
    try:
        with tqdm(total=len(samples), initial=len(samples) - left, unit="img", desc=spec.field) as bar:
            for (shard, asked), (_, kept, pixels, failed) in zip(batches, loader, strict=True):
                if kept:
                    values = encode(pixels).cpu().numpy().astype(spec.dtype)  # (n, *shape)
                    writer.put(shard, kept, values)
                unreadable += failed
                bar.update(len(asked))
        _refuse_if_nothing_was_readable(len(samples), unreadable)
        manifest = writer.finish()
    finally:
        writer.close()
    if unreadable:
        with open(folder / UNREADABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("id", "problem"), *unreadable])
        print(
            f"{len(unreadable)} images could not be read and are left out: {folder / UNREADABLE}",
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
    """Say how much will be written and refuse when the disk cannot hold it (3 % above the payload is LMDB's share)."""
    needed, free = int(payload * 1.13), shutil.disk_usage(folder).free
    print(f"{folder}: {what} to write, {needed / 1e9:.2f} GB; {free / 1e9:.1f} GB free")
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: free some or move --out"
        )


def _refuse_if_nothing_was_readable(total: int, unreadable: list) -> None:
    if len(unreadable) == total:
        raise UserError(f"not one of {total} images could be read, the first: {unreadable[0][1]}")
