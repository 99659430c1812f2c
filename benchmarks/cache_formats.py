"""The same samples in every format that people keep caches in, written and read as each format's own manual says.

A sample is a latent (4, 64, 64) and tokens (196, 1024), fp16: 434,176 bytes. `FORMATS` is the table.
"""

import importlib
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import files_of
from benchmarks.synthetic_run import SIZES, write_cache
from cache.batch_stream import BatchStream
from cache.dataset import AlignedDataset

# PyTorch warns of read-only memory; nobody writes into these tensors.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")

FIELDS = {name: SIZES["full"][name] for name in ("latents", "tokens")}  # SD-1.5 at 512 px, DINOv2-L at 196 px
VALUE_BYTES = {name: 2 * math.prod(shape) for name, shape in FIELDS.items()}
SAMPLE_BYTES = sum(VALUE_BYTES.values())
NAMES_OF_OURS = {"latents": "latent", "tokens": "dino_tokens"}
BATCH = 64
Values = dict[str, Tensor]  # of n samples, latents (n, 4, 64, 64) and tokens (n, 196, 1024)
Delivered = tuple[list[int], Values]  # which samples, and their values as one batch in host memory
Read = Callable[
    [Path, Iterable[list[int]], int], Iterator[Delivered]
]  # of a folder, batches, workers or threads


def random_values(count: int) -> Values:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *shape, generator=generator).half() for name, shape in FIELDS.items()}


def write_random(
    folder: Path, count: int, values_of: Callable[[str, list[int]], Tensor], shard_size: int, classes: int
) -> None:
    """Write our cache at full size; its ids are like ImageNet's, so that those of one class are neighbours."""
    ids = [f"n{index // 200:08d}/n{index // 200:08d}_{index}" for index in range(count)]
    write_cache(folder, ids, SIZES["full"], values_of, classes=classes, shard_size=shard_size)


def write_ours(folder: Path, values: Values) -> None:
    count = len(values["latents"])
    # Few classes: the text table is read when a training starts, not when a batch is.
    write_random(folder, count, lambda field, rows: values[field][rows], count // 2, classes=10)


def samples_of(values: Values) -> Iterator[dict[str, np.ndarray]]:
    for latents, tokens in zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True):
        yield {"latents": latents, "tokens": tokens}


def bytes_of(sample: dict[str, np.ndarray]) -> bytes:
    return sample["latents"].tobytes() + sample["tokens"].tobytes()


def write_lmdb(folder: Path, values: Values, encode: Callable[[dict], bytes] = bytes_of) -> None:
    with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=1 << 40, lib_version=0) as environment:
        for index, sample in enumerate(samples_of(values)):
            with environment.begin(write=True) as transaction:
                transaction.put(b"%08d" % index, encode(sample))


def write_pickled_lmdb(folder: Path, values: Values) -> None:
    write_lmdb(folder, values, pickle.dumps)


def write_flat(folder: Path, values: Values) -> None:
    for name, value in values.items():
        value.numpy().tofile(folder / f"{name}.bin")


def write_mds(folder: Path, values: Values) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in FIELDS.items()}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in samples_of(values):
            writer.write(sample)


def write_hdf5(folder: Path, values: Values) -> None:
    """Write a chunk for each value."""
    import h5py

    with h5py.File(folder / "data.h5", "w") as file:
        for name, value in values.items():
            file.create_dataset(name, data=value.numpy(), chunks=(1, *FIELDS[name]))


def write_tars(folder: Path, values: Values) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=128, verbose=0) as writer:
        for index, sample in enumerate(samples_of(values)):
            writer.write(
                {"__key__": f"{index:08d}"} | {name: value.tobytes() for name, value in sample.items()}
            )


@dataclass(frozen=True)
class Format:
    write: Callable[[Path, Values], None]
    needs: str | None = None  # a module that is not in requirements.txt


FORMATS = {
    "ours": Format(write_ours),
    "lmdb, pickled": Format(write_pickled_lmdb),
    "lmdb, raw": Format(write_lmdb),
    "flat": Format(write_flat),
    "mds": Format(write_mds, "streaming"),
    "hdf5": Format(write_hdf5, "h5py"),
    "tar": Format(write_tars, "webdataset"),
}


def write_formats(
    folder: Path, names: Iterable[str], values: Values
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write each format into a durable folder of its own; returns the folders, and the reasons why others are absent."""
    folders, absent = {}, {}
    for name in names:
        try:
            if FORMATS[name].needs:
                importlib.import_module(FORMATS[name].needs)
        except ImportError as error:
            absent[name] = f"{error}; install benchmarks/requirements.txt with --no-deps"
            continue
        folders[name] = folder / name.replace(", ", "-")
        folders[name].mkdir()
        FORMATS[name].write(folders[name], values)
        for path in files_of(folders[name]):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return folders, absent


class LazyDataset(Dataset):
    """Opens its files in the process that reads them, when it first does."""

    def __init__(self, folder: Path):
        self.folder, self._opened = folder, None

    @property
    def opened(self):
        if self._opened is None:
            self._opened = self.open()
        return self._opened

    def __getitem__(self, index: int) -> Values:
        return {name: torch.from_numpy(value) for name, value in self.arrays(index).items()}

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        return {name: stored[index] for name, stored in self.opened.items()}


class Ours(LazyDataset):
    """Our dataset under the names of this file; its items also carry the text embedding of their class."""

    def open(self) -> AlignedDataset:
        return AlignedDataset(
            self.folder / "list.csv", *(self.folder / name for name in ("latents", "tokens", "text"))
        )

    def __getitems__(self, indices: list[int]) -> list[Values]:
        of_here = {ours: name for name, ours in NAMES_OF_OURS.items()}
        items = self.opened.__getitems__(indices)
        return [{of_here.get(name, name): value for name, value in item.items()} for item in items]


class PickledLmdb(LazyDataset):
    """The obvious way: pickled samples, LMDB's own flags, a transaction for each sample."""

    def open(self):
        return lmdb.open(str(self.folder / "data.lmdb"), subdir=False, readonly=True, lib_version=0)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        with self.opened.begin() as transaction:
            return pickle.loads(transaction.get(b"%08d" % index))


class RawLmdb(LazyDataset):
    """Raw bytes, no copy before the batch, one long transaction, the flags that blogs recommend."""

    readahead = False

    def open(self):
        environment = lmdb.open(
            str(self.folder / "data.lmdb"), subdir=False, readonly=True, lock=False, readahead=self.readahead,
            meminit=False, lib_version=0,
        )  # fmt: skip
        return environment.begin(buffers=True)

    def __getitem__(self, index: int) -> Values:
        record, start = self.opened.get(b"%08d" % index), VALUE_BYTES["latents"]
        return shaped({"latents": record[:start], "tokens": record[start:]})


class RawLmdbReadahead(RawLmdb):
    """The same with the kernel's read-ahead."""

    readahead = True


def shaped(parts: dict[str, bytes]) -> Values:
    """The bytes of one sample as values, without a copy."""
    return {
        name: torch.frombuffer(part, dtype=torch.float16).view(FIELDS[name]) for name, part in parts.items()
    }


class FlatFiles(LazyDataset):
    """One file for each field, mapped into memory."""

    def open(self) -> dict[str, np.memmap]:
        maps = {name: np.memmap(self.folder / f"{name}.bin", np.float16, "r") for name in FIELDS}
        return {name: mapped.reshape(-1, *FIELDS[name]) for name, mapped in maps.items()}


class Mds(LazyDataset):
    def open(self):
        from streaming import LocalDataset

        return LocalDataset(str(self.folder / "mds"))

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        return self.opened[index]


class Hdf5(LazyDataset):
    def open(self):
        import h5py

        file = h5py.File(self.folder / "data.h5", "r")
        return {name: file[name] for name in FIELDS}


def loaded(dataset: type[Dataset]) -> Read:
    """Read by an ordinary DataLoader with PyTorch's own collation."""

    def read(folder: Path, batches: Sequence[list[int]], workers: int) -> Iterator[Delivered]:
        loader = DataLoader(dataset(folder), batch_sampler=batches, num_workers=workers)
        for indices, batch in zip(batches, loader, strict=True):
            yield indices, {name: batch[name] for name in FIELDS}

    return read


def load_tars(folder: Path, batches: Sequence[list[int]], workers: int) -> Iterator[Delivered]:
    """Read as many batches of whole tar files in random order through a buffer of samples: no random access."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(128).map(_tar_sample)
    loader = DataLoader(dataset.repeat(), batch_size=BATCH, num_workers=workers)
    for batch, _ in zip(loader, batches, strict=False):
        yield batch["index"].tolist(), {name: batch[name] for name in FIELDS}


def _tar_sample(sample: dict) -> dict:
    return shaped({name: sample[name] for name in FIELDS}) | {"index": int(sample["__key__"])}


def stream_ours(folder: Path, batches: Iterable[list[int]], threads: int) -> Iterator[Delivered]:
    """Read as training does."""
    dataset = Ours(folder).opened
    stream = BatchStream(batches, dataset.read_batch, dataset.value_bytes, dataset.decode, threads=threads)
    cpu = torch.device("cpu")
    for batch in stream:
        yield batch.indices, {name: batch.on(cpu, ours) for name, ours in NAMES_OF_OURS.items()}


def stream_mapped(folder: Path, batches: Sequence[list[int]], threads: int) -> Iterator[Delivered]:
    """The least that a random read can cost: one copy of a memory map into memory that is used again."""
    maps = {
        name: mapped.reshape(len(mapped), -1).view(np.uint8)
        for name, mapped in FlatFiles(folder).opened.items()
    }

    def copy(name: str, index: int, out: np.ndarray) -> None:
        out[:] = maps[name][index]

    yield from _stream_flat(copy, batches, threads)


def stream_preadv(folder: Path, batches: Sequence[list[int]], threads: int) -> Iterator[Delivered]:
    """The same by system calls, which are safe where a file shrinks or a disk fails; a map ends the process."""
    with ExitStack() as files:
        opened = {name: files.enter_context(open(folder / f"{name}.bin", "rb")).fileno() for name in FIELDS}

        def copy(name: str, index: int, out: np.ndarray) -> None:
            os.preadv(opened[name], [out], index * VALUE_BYTES[name])

        yield from _stream_flat(copy, batches, threads)


def _stream_flat(copy: Callable[[str, int, np.ndarray], None], batches, threads: int) -> Iterator[Delivered]:
    def read(indices: Sequence[int], raw: Values) -> None:
        for name in FIELDS:
            out = raw[name].numpy()  # (n, value_bytes)
            for place, index in enumerate(indices):
                copy(name, index, out[place])

    for batch in BatchStream(batches, read, VALUE_BYTES, {}, threads=threads):
        values = {name: raw.view(torch.float16).view(-1, *FIELDS[name]) for name, raw in batch.raw.items()}
        yield batch.indices, values
