"""Our cache with random values of full-size shapes, and the ways of reading it.

A sample is a latent (4, 64, 64) and tokens (196, 1024), fp16: 434,176 bytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache.batch_stream import BatchStream
from cache.dataset import AlignedDataset
from cache.image_list import Sample, write_samples
from cache.manifest import FieldSpec
from cache.shards import FieldWriter
from cache.text import text_spec, write_table

FIELDS = {"latents": (4, 64, 64), "tokens": (196, 1024)}  # SD-1.5 at 512 px, DINOv2-L at 196 px
VALUE_BYTES = {name: 2 * math.prod(shape) for name, shape in FIELDS.items()}
SAMPLE_BYTES = sum(VALUE_BYTES.values())
NAMES_OF_OURS = {"latents": "latent", "tokens": "dino_tokens"}
BATCH = 64
DETAILS = {"latents": {"posterior": "mode", "scaled": True, "scaling_factor": 0.18215}, "tokens": {}}
Values = dict[str, Tensor]  # of n samples, latents (n, 4, 64, 64) and tokens (n, 196, 1024)
Delivered = tuple[list[int], Values]  # which samples, and their values as one batch in host memory


def random_values(count: int, seed: int = 0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=generator).half() for name, shape in FIELDS.items()}


def id_of(index: int) -> str:
    """As ImageNet's: ids of one class are neighbours."""
    return f"n{index // 200:08d}/n{index // 200:08d}_{index}"


def write_cache(
    folder: Path, count: int, values_of: Callable[[str, list[int]], Tensor], shard_size: int, *, classes: int
) -> None:
    """A cache as scripts 1 to 4 leave it, with the values that `values_of` gives of a field for some indices."""
    ids = [id_of(index) for index in range(count)]
    write_samples(folder / "list.csv", [Sample(key, "unused", n % classes, "n") for n, key in enumerate(ids)])
    text = torch.randn(classes + 1, 77, 768).half()
    fields = {"prompt_embeds": text}
    write_table(folder / "text", fields, text_spec(fields, "random numbers"))
    index_of = {key: index for index, key in enumerate(ids)}
    for field, shape in FIELDS.items():
        spec = FieldSpec(field, shape, "float16", "random numbers", details=DETAILS[field])
        writer = FieldWriter(folder / field, spec, ids, shard_size=shard_size)
        for shard, batch in writer.pending(BATCH):
            writer.put(shard, batch, spec.encode(values_of(field, [index_of[key] for key in batch])))
        writer.finish()


def open_ours(folder: Path) -> AlignedDataset:
    return AlignedDataset(folder / "list.csv", folder / "latents", folder / "tokens", folder / "text")


def stream_ours(folder: Path, batches: Sequence[list[int]], threads: int) -> Iterator[Delivered]:
    """As training reads it."""
    dataset = open_ours(folder)
    stream = BatchStream(batches, dataset.read_batch, dataset.value_bytes, dataset.decode, threads=threads)
    cpu = torch.device("cpu")
    for batch in stream:
        yield batch.indices, {name: batch.on(cpu, ours) for name, ours in NAMES_OF_OURS.items()}


class OursPerItem(Dataset):
    """Our dataset under the names of this file; its items also carry the text embedding of their class."""

    def __init__(self, folder: Path):
        self.dataset = open_ours(folder)

    def __getitems__(self, indices: list[int]) -> list[Values]:
        of_here = {ours: name for name, ours in NAMES_OF_OURS.items()}
        items = self.dataset.__getitems__(indices)
        return [{of_here.get(name, name): value for name, value in item.items()} for item in items]


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def insist_exact(delivered: Iterator[Delivered], values: Values, count: int) -> None:
    """Raise unless `count` samples arrive and every bit of them is what was written."""
    seen = 0
    for indices, batch in delivered:
        seen += len(indices)
        for name, value in batch.items():
            if not torch.equal(value.half().view(torch.int16), values[name][indices].view(torch.int16)):
                raise AssertionError(f"{name} of samples {indices[:4]} … are not what was written")
    if seen != count:
        raise AssertionError(f"{seen} samples arrived, {count} were asked for")
